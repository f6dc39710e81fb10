"""Metrics that compare image sets. METRICS lists them by name, with the inputs that each needs.

The Fréchet distance between Gaussians with means m and covariances C is
d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)).
With Inception features it is the FID (Heusel et al. 2017).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from evaluation.neighbours import DENSITY_K, PRECISION_K, neighbour_scores
from evaluation.statistics import Statistics, require_finite_features
from evaluation.summary import GROUPS, Summary, center_of
from options import UsageError
from runtime.randomness import generator_for

__all__ = [
    "METRICS",
    "Metric",
    "check_comparable",
    "check_counts",
    "check_widths",
    "compute_metrics",
    "error_bars",
    "frechet_distance",
    "inception_score",
    "psnr",
    "split_order",
]

INCEPTION_SPLITS = 10
CHUNK = 1000  # rows per block of the kernel matrix


@dataclass(frozen=True)
class Metric:
    """A metric and the inputs that it needs.

    Attributes:
        title: name in results that use Inception features.
        need: key of evaluation.summary.NEEDS.
        compute: maps the generated and the reference summary to the values of one or more metrics, by name.
        against_reference: False if the metric ignores the real images.
        fewest_samples: number of samples below which the metric is undefined.
        fewest_real: number of real images below which it is undefined.
    """

    title: str
    need: str
    compute: Callable[[Summary, Summary], Mapping[str, float]]
    against_reference: bool = True
    fewest_samples: int = 1
    fewest_real: int = 1


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance d^2 between two Gaussians, computed in float64. Covariances may be singular.

    Raises:
        UsageError: the statistics come from different feature networks or image sizes, or the distance is not finite.
    """
    check_comparable(a.meta, b.meta)
    check_widths(len(a.mean), len(b.mean))
    for statistics in (a, b):
        require_finite_features("cannot compute a Fréchet distance: ", statistics.mean, statistics.covariance)
    difference = a.mean - b.mean
    overlap = _root_trace(*(torch.from_numpy((s.covariance + s.covariance.T) / 2) for s in (a, b)))
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    if not math.isfinite(distance):
        raise UsageError("cannot compute a Fréchet distance: the features are too large for float64")
    return max(0.0, float(distance))


def kernel_distance(generated: Summary, reference: Summary) -> float:
    """KID: unbiased squared MMD over all pairs of rows with kernel (x.y / D + 1)^3 (Binkowski et al. 2018, Eq. 3-4).

    It has the same expectation as the usual mean over subsets of 1,000 and a smaller variance.
    """
    assert generated.rows is not None
    assert reference.rows is not None
    cross = _kernel_sum(generated.rows, reference.rows, center_of(reference.rows), generated.device)
    n, m = len(generated.rows), len(reference.rows)
    within = _within_kernel_sum(generated) / (n * (n - 1)) + _within_kernel_sum(reference) / (m * (m - 1))
    return within - 2 * cross / (n * m)


def inception_score(logits: torch.Tensor) -> float:
    """Inception Score: exp of the mean KL(p(y|x) || p(y)), averaged over ten splits of the rows (Salimans et al. 2016).

    A fixed permutation precedes the splits, so that samples sorted by class do not leave one class in each.
    """
    scores = []
    for part in logits[split_order(len(logits))].double().tensor_split(min(INCEPTION_SPLITS, len(logits))):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append(math.exp(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean())))
    return sum(scores) / len(scores)


def split_order(count: int) -> torch.Tensor:
    """The permutation [count] of the samples that precedes the Inception Score's splits."""
    return torch.randperm(count, generator=generator_for(0, "inception score", count))


def psnr(mse: float, value_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB for a mean squared error. `value_range` is 2 for pixels in [-1, 1]."""
    return 10 * math.log10(value_range**2 / mse) if mse > 0 else math.inf


def _fid(generated: Summary, reference: Summary) -> dict[str, float]:
    assert generated.statistics is not None
    assert reference.statistics is not None
    return {"fid": frechet_distance(generated.statistics, reference.statistics)}


def _sfid(generated: Summary, reference: Summary) -> dict[str, float]:
    assert generated.spatial is not None
    assert reference.spatial is not None
    return {"sfid": frechet_distance(generated.spatial, reference.spatial)}


def _inception_score(generated: Summary, reference: Summary) -> dict[str, float]:
    assert generated.logits is not None
    return {"is": inception_score(generated.logits)}


def _kid(generated: Summary, reference: Summary) -> dict[str, float]:
    return {"kid": kernel_distance(generated, reference)}


METRICS: dict[str, Metric] = {
    "fid": Metric("FID", "moments", _fid, fewest_samples=2, fewest_real=2),
    "sfid": Metric("sFID", "spatial", _sfid, fewest_samples=2, fewest_real=2),
    "is": Metric("Inception Score", "logits", _inception_score, against_reference=False),
    "kid": Metric("KID", "rows", _kid, fewest_samples=2, fewest_real=2),
    **{
        name: Metric(
            name, "rows", neighbour_scores, fewest_samples=PRECISION_K + 1, fewest_real=max(PRECISION_K, DENSITY_K) + 1
        )
        for name in ("precision", "recall", "density", "coverage")
    },
}


def check_counts(names: Sequence[str], samples: int | None, real: int | None) -> None:
    """Check that there are enough samples and real images for the metrics `names`. None: the number is not known.

    Raises:
        UsageError: a metric is undefined for so few.
    """
    for name in names:
        metric = METRICS[name]
        for count, fewest, what in (
            (samples, metric.fewest_samples, "samples"),
            (real if metric.against_reference else None, metric.fewest_real, "reference images"),
        ):
            if count is not None and count < fewest:
                raise UsageError(f"--metrics {name} needs at least {fewest} {what}, but there are {count}")


def compute_metrics(names: Sequence[str], generated: Summary, reference: Summary) -> dict[str, float]:
    """Compute metrics by name. Metrics with the same `compute` function share one call.

    Raises:
        UsageError: the sets come from different feature networks or image sizes, have too few images, or get a score that is
            not finite.
    """
    check_comparable(generated.meta, reference.meta)
    check_counts(names, generated.known_count, reference.known_count)
    values: dict[str, float] = {}
    for compute in dict.fromkeys(METRICS[name].compute for name in names):
        values |= compute(generated, reference)
    if bad := [name for name in names if not math.isfinite(values[name])]:
        raise UsageError(
            f"--metrics {' '.join(bad)}: the score is not finite (NaN or infinity); the features may be too large: check the "
            "feature network, or choose other metrics"
        )
    return {name: values[name] for name in names}


def error_bars(names: Sequence[str], part: Callable[[Sequence[int]], Summary], reference: Summary) -> dict[str, float]:
    """Estimate each metric's standard deviation over sets of samples of the same size, for a fixed reference.

    The samples are split into halves A and B in seven ways. A metric's values v_A and v_B have the same bias, because the
    bias depends only on the number of samples. If the whole set's value has variance sigma^2, each half's value has variance
    2 sigma^2, so E (v_A - v_B)^2 = 4 sigma^2.
    The splits are balanced half-samples (McCarthy 1969): a Hadamard matrix over eight groups makes them uncorrelated.
    The estimate has seven degrees of freedom and is accurate to about 27 %.

    Args:
        names: metrics.
        part: returns the summary of the samples in the given groups, a subset of 0..7.
        reference: the real images.
    """
    squares = dict.fromkeys(names, 0.0)
    for split in range(1, GROUPS):
        half = [group for group in range(GROUPS) if (group & split).bit_count() % 2]
        rest = [group for group in range(GROUPS) if group not in half]
        first, second = (compute_metrics(names, part(groups), reference) for groups in (half, rest))
        for name in names:
            squares[name] += (first[name] - second[name]) ** 2 / (GROUPS - 1)
    return {name: math.sqrt(square) / 2 for name, square in squares.items()}


def check_comparable(a: Mapping[str, object], b: Mapping[str, object]) -> None:
    """Check that two image sets, described by their metadata, have the same feature network and image size.

    Raises:
        UsageError: they differ. Missing entries are not compared.
    """
    networks = [meta.get("features") for meta in (a, b)]
    if all(networks) and networks[0]["sha256"] != networks[1]["sha256"]:  # type: ignore[index]
        described = [f"{item['name']} {item['sha256'][:8]}" for item in networks]  # type: ignore[index]
        raise UsageError(f"cannot compare statistics of different feature networks: {described[0]} and {described[1]}")
    sizes = [meta.get("resolution") for meta in (a, b)]
    if all(sizes) and sizes[0] != sizes[1]:
        described = [size if isinstance(size, str) else "{1} x {0}".format(*size) for size in sizes]  # type: ignore[misc]
        raise UsageError(
            f"cannot compare images of different sizes: the samples are {described[0]}, the reference is {described[1]}; "
            "use --image_size to resize both to the same size"
        )


def check_widths(samples: int, reference: int) -> None:
    """Check that two sets have the same number of features.

    Raises:
        UsageError: they differ.
    """
    if samples != reference:
        raise UsageError(
            f"cannot compare statistics of {samples} features with statistics of {reference} features: choose another "
            "--features or --dims"
        )


def _root_trace(a: torch.Tensor, b: torch.Tensor) -> float:
    """Compute tr((a b)^(1/2)) for covariances [D, D].

    With b = R R^T, the matrices a b and R^T a R have the same eigenvalues. A symmetric eigenvalue solver is many times faster
    than a matrix square root. Singular covariances use the singular values of R_a^T R_b instead, because the square root of an
    eigenvalue that should be zero would be as large as the square root of the rounding error.
    """
    factors = [torch.linalg.cholesky_ex(matrix) for matrix in (a, b)]
    if all(factor.info == 0 for factor in factors):
        root = factors[1].L
        return float(torch.linalg.eigvalsh(root.T @ a @ root).clamp(min=0).sqrt().sum())
    return float(torch.linalg.svdvals(_thin_root(a).T @ _thin_root(b)).sum())


def _thin_root(covariance: torch.Tensor) -> torch.Tensor:
    """Factor R [D, rank] with R R^T = covariance, from the symmetric eigendecomposition."""
    values, vectors = torch.linalg.eigh(covariance)
    positive = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, positive] * values[positive].sqrt()


@lru_cache(maxsize=2)  # error bars score many subsets of the samples against one reference
def _within_kernel_sum(summary: Summary) -> float:
    """Sum of the kernel over all pairs of different rows."""
    assert summary.rows is not None
    blocks = summary.rows.double().split(CHUNK)
    diagonal = sum(float(_kernel((part * part).sum(1), part.shape[1]).sum()) for part in blocks)
    return _kernel_sum(summary.rows, summary.rows, center_of(summary.rows), summary.device) - diagonal


def _kernel_sum(a: torch.Tensor, b: torch.Tensor, center: torch.Tensor, device: torch.device | str) -> float:
    """Sum of the kernel over all pairs of rows.

    Large products are exact to float64: x.y = (x - c).(y - c) + x.c + y.c - c.c, where only the first term, which is small if
    c is near the rows, is computed in float32.
    """
    c = center.double().to(device)
    along_b = torch.cat([part.to(device).double() @ c for part in b.split(CHUNK)])
    b = (b - center).to(device)
    total = 0.0
    for part in a.split(CHUNK):
        along = (part.to(device).double() @ c)[:, None] + along_b - c @ c
        products = (part - center).to(device) @ b.T
        total += float(_kernel(products.double() + along, b.shape[1]).sum())
    return total


def _kernel(products: torch.Tensor, dims: int) -> torch.Tensor:
    return (products / dims + 1) ** 3
