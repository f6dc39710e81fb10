"""Distances between image sets, in one dictionary: what each needs of the sets, and its value.

Fréchet distance of two Gaussians, which is the FID when the features are Inception's (Heusel et al. 2017):
d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from evaluation.neighbours import neighbour_scores
from evaluation.statistics import Statistics
from evaluation.summary import GROUPS, Summary
from options import UsageError

__all__ = ["METRICS", "Metric", "check_comparable", "compute_metrics", "error_bars", "frechet_distance", "psnr"]

INCEPTION_SPLITS = 10
CHUNK = 1000  # rows whose kernels with all others are held at a time


@dataclass(frozen=True)
class Metric:
    """`need` is a key of evaluation.summary.NEEDS; `compute(generated, reference)` gives the values of one or more metrics.

    `title` is the metric's name with Inception's features; `against_reference` is false where no real images matter.
    """

    title: str
    need: str
    compute: Callable[[Summary, Summary], Mapping[str, float]]
    against_reference: bool = True


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The squared Fréchet distance d^2 between two Gaussians, in float64; singular covariances are admitted.

    Raises:
        UsageError: statistics of different features or resolutions.
    """
    check_comparable(a.meta, b.meta)
    if a.mean.shape != b.mean.shape:
        raise UsageError(f"cannot compare statistics of {len(a.mean)} with statistics of {len(b.mean)} features")
    difference = a.mean - b.mean
    overlap = _root_trace(*(torch.from_numpy((s.covariance + s.covariance.T) / 2) for s in (a, b)))
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(0.0, float(distance))


def kernel_distance(generated: Summary, reference: Summary) -> float:
    """KID: the unbiased squared MMD over all pairs of rows, kernel (x.y / D + 1)^3 (Binkowski et al. 2018, Eq. 3-4).

    Its expectation is that of the usual mean over subsets of 1,000, and its variance is smaller.
    """
    assert generated.rows is not None
    assert reference.rows is not None
    cross = _kernel_sum(generated.rows, reference.rows, generated.device)
    n, m = len(generated.rows), len(reference.rows)
    within = _own_kernel_sum(generated) / (n * (n - 1)) + _own_kernel_sum(reference) / (m * (m - 1))
    return within - 2 * cross / (n * m)


def inception_score(logits: torch.Tensor) -> float:
    """exp of the mean KL divergence of p(y|x) from p(y), averaged over ten splits of the rows (Salimans et al. 2016)."""
    scores = []
    for part in logits.double().tensor_split(min(INCEPTION_SPLITS, len(logits))):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append(math.exp(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean())))
    return sum(scores) / len(scores)


def psnr(mse: float, value_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error; `value_range` is 2 for pixels in [-1, 1]."""
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
    "fid": Metric("FID", "moments", _fid),
    "sfid": Metric("sFID", "spatial", _sfid),
    "is": Metric("Inception Score", "logits", _inception_score, against_reference=False),
    "kid": Metric("KID", "rows", _kid),
    "precision": Metric("precision", "rows", neighbour_scores),
    "recall": Metric("recall", "rows", neighbour_scores),
    "density": Metric("density", "rows", neighbour_scores),
    "coverage": Metric("coverage", "rows", neighbour_scores),
}


def compute_metrics(names: Sequence[str], generated: Summary, reference: Summary) -> dict[str, float]:
    """The values of metrics by name; what several share is computed once.

    Raises:
        UsageError: sets of different features or resolutions.
    """
    check_comparable(generated.meta, reference.meta)
    values: dict[str, float] = {}
    for compute in dict.fromkeys(METRICS[name].compute for name in names):
        values |= compute(generated, reference)
    return {name: values[name] for name in names}


def error_bars(names: Sequence[str], part: Callable[[Sequence[int]], Summary], reference: Summary) -> dict[str, float]:
    """One standard deviation of each metric under another draw of as many samples, the reference being fixed.

    A set of n samples is cut into halves A and B in seven ways. Both halves' values have the same bias, which depends on their
    size, and a variance twice that of the whole, so E (v_A - v_B)^2 = 4 sigma^2. The seven ways are the balanced
    ones of a Hadamard matrix over eight groups (balanced half-samples, McCarthy 1969), which makes them uncorrelated:
    the estimate has seven degrees of freedom, and is good to about 27 %.

    Args:
        names: metrics.
        part: the summary of the samples in some of the groups 0..7.
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
    """Refuse two descriptions of image sets that say they have other feature networks or resolutions.

    Raises:
        UsageError: they do; the message names both.
    """
    networks = [meta.get("features") for meta in (a, b)]
    if all(networks) and networks[0]["sha256"] != networks[1]["sha256"]:  # type: ignore[index]
        described = [f"{item['name']} {item['sha256'][:8]}" for item in networks]  # type: ignore[index]
        raise UsageError(f"cannot compare statistics of different feature networks: {described[0]} and {described[1]}")
    sizes = [meta.get("resolution") for meta in (a, b)]
    if all(sizes) and sizes[0] != sizes[1]:
        described = [size if isinstance(size, str) else "{1} x {0}".format(*size) for size in sizes]  # type: ignore[misc]
        raise UsageError(
            f"cannot compare images of different sizes: the samples are {described[0]}, the reference {described[1]}; "
            "bring both to one --image_size"
        )


def _root_trace(a: torch.Tensor, b: torch.Tensor) -> float:
    """tr((a b)^(1/2)) of covariances [D, D].

    With b = R R^T, a b has the eigenvalues of R^T a R, of which a symmetric solver finds the roots many times faster than a
    matrix square root. Singular matrices go by the singular values of R_a^T R_b: roots of eigenvalues that ought to
    be zero would be as large as the root of the rounding error.
    """
    factors = [torch.linalg.cholesky_ex(matrix) for matrix in (a, b)]
    if all(factor.info == 0 for factor in factors):
        root = factors[1].L
        return float(torch.linalg.eigvalsh(root.T @ a @ root).clamp(min=0).sqrt().sum())
    return float(torch.linalg.svdvals(_thin_root(a).T @ _thin_root(b)).sum())


def _thin_root(covariance: torch.Tensor) -> torch.Tensor:
    """R [D, rank] with R R^T = covariance, by symmetric eigen-decomposition."""
    values, vectors = torch.linalg.eigh(covariance)
    positive = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, positive] * values[positive].sqrt()


@lru_cache(maxsize=2)  # the reference's serves for the whole set of samples and for its halves
def _own_kernel_sum(summary: Summary) -> float:
    assert summary.rows is not None
    own = sum(float(_kernel((part * part).sum(1), part.shape[1]).sum()) for part in summary.rows.double().split(CHUNK))
    return _kernel_sum(summary.rows, summary.rows, summary.device) - own


def _kernel_sum(a: torch.Tensor, b: torch.Tensor, device: torch.device | str) -> float:
    b = b.to(device)
    products = (part.to(device) @ b.T for part in a.split(CHUNK))
    return sum(float(_kernel(product.double(), b.shape[1]).sum()) for product in products)


def _kernel(products: torch.Tensor, dims: int) -> torch.Tensor:
    return (products / dims + 1) ** 3
