import math

import numpy as np
import pytest
import torch

from evaluation.metrics import METRICS, compute_metrics, error_bars, frechet_distance, inception_score, psnr
from evaluation.statistics import Statistics
from evaluation.summary import GROUPS, Gatherer, Summary
from options import UsageError
from tests.fake_features import Pixels


def random_statistics(seed: int, dims: int, count: int = 100_000) -> Statistics:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(3 * dims, dims)) @ generator.normal(size=(dims, dims))
    return Statistics(rows.mean(0), np.cov(rows, rowvar=False), count)


def select_rows(rows: np.ndarray) -> Statistics:
    return Statistics(rows.mean(0), np.cov(rows, rowvar=False), len(rows))


def summary_of(rows: torch.Tensor) -> Summary:
    return Summary(len(rows), {}, rows=rows, statistics=select_rows(rows.double().numpy()), logits=rows)


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    means, deviations = np.array([[0.0, 1.0, -2.0], [0.5, 1.0, 1.0]]), np.array([[1.0, 2.0, 0.0], [3.0, 0.5, 2.0]])
    a, b = (Statistics(m, np.diag(s**2), 1000) for m, s in zip(means, deviations, strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dims", [2, 17, 64])
def test_distance_equals_pytorch_fids(dims):
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    a, b = random_statistics(1, dims), random_statistics(2, dims)
    theirs = fid_score.calculate_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)


def test_distance_is_symmetric_and_zero_to_itself():
    a, b = random_statistics(1, 32), random_statistics(2, 32)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * np.trace(a.covariance))


def test_singular_covariances_are_allowed():
    generator = np.random.default_rng(0)
    few = select_rows(generator.normal(size=(5, 32)))
    moved = Statistics(few.mean + 1, few.covariance, 5)
    assert frechet_distance(few, moved) == pytest.approx(32, rel=1e-9)
    # With fewer samples than features, compare against a full-rank covariance using the eigenvalues of a symmetric product.
    full = random_statistics(1, 32)
    root = np.linalg.cholesky(full.covariance)
    overlap = np.sqrt(np.linalg.eigvalsh(root.T @ few.covariance @ root).clip(min=0)).sum()
    expected = ((few.mean - full.mean) ** 2).sum() + np.trace(few.covariance + full.covariance) - 2 * overlap
    assert frechet_distance(few, full) == pytest.approx(expected, rel=1e-8)
    nothing = Statistics(np.zeros(32), np.zeros((32, 32)), 5)
    assert frechet_distance(nothing, full) == pytest.approx(full.mean @ full.mean + np.trace(full.covariance))


def test_statistics_of_different_features_are_refused():
    with pytest.raises(UsageError, match="2 features with statistics of 3|2 with statistics of 3|2.*3"):
        frechet_distance(random_statistics(1, 2), random_statistics(1, 3))
    a, b = (
        Statistics(np.zeros(2), np.eye(2), 10, {"features": {"name": "inception", "sha256": letter * 64}})
        for letter in "ab"
    )
    with pytest.raises(UsageError, match="aaaaaaaa and inception bbbbbbbb"):
        frechet_distance(a, b)


def test_other_resolutions_are_refused():
    a, b, mixed, unknown = (Summary(3, {"resolution": size}) for size in ([32, 48], [64, 64], "mixed", None))
    for other in (b, mixed):
        with pytest.raises(UsageError, match=r"samples are 48 x 32, the reference is (64 x 64|mixed).*--image_size"):
            compute_metrics([], a, other)
    assert compute_metrics([], a, unknown) == {}


def test_kid_equals_torch_fidelitys():
    from torch_fidelity.metric_kid import kid_features_to_metric

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 7, generator=generator), torch.randn(60, 7, generator=generator) * 1.2 + 0.3
    theirs = kid_features_to_metric(a.double(), b.double(), kid_subsets=1, kid_subset_size=60, verbose=False)
    ours = compute_metrics(["kid"], summary_of(a), summary_of(b))["kid"]
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)


def test_kid_of_sets_of_different_sizes_is_the_unbiased_estimate(monkeypatch):
    monkeypatch.setattr("evaluation.metrics.CHUNK", 3)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 4, generator=generator), torch.randn(5, 4, generator=generator) + 1

    def mean_kernel(x: torch.Tensor, y: torch.Tensor, same: bool) -> float:
        values = [
            (float(p @ q) / 4 + 1) ** 3 for i, p in enumerate(x) for j, q in enumerate(y) if not (same and i == j)
        ]
        return sum(values) / len(values)

    expected = mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False)
    assert compute_metrics(["kid"], summary_of(a), summary_of(b))["kid"] == pytest.approx(expected, rel=1e-5)


def test_inception_score_equals_torch_fidelitys():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(103, 11, generator=torch.Generator().manual_seed(0)) * 2
    blocks = torch.cat([logits[i * 103 // 10 : (i + 1) * 103 // 10] for i in range(10)])
    theirs = isc_features_to_metric(blocks[:100], splits=10, shuffle=False)["inception_score_mean"]
    assert inception_score(logits[:100]) == pytest.approx(theirs, rel=1e-9)
    certain = (
        torch.eye(10).repeat(10, 1) * 1e4
    )  # ten classes, each predicted with certainty and equally frequent in every split
    assert inception_score(certain) == pytest.approx(10)
    assert inception_score(torch.zeros(40, 10)) == pytest.approx(1)


def test_metrics_share_common_work(monkeypatch):
    calls = []

    def counted(generated, reference):
        calls.append(1)
        return {"precision": 0.1, "recall": 0.2}

    for name in ("precision", "recall"):
        monkeypatch.setitem(METRICS, name, type(METRICS[name])(name, "rows", counted))
    assert compute_metrics(["recall", "precision"], Summary(1, {}), Summary(1, {})) == {"recall": 0.2, "precision": 0.1}
    assert len(calls) == 1


def test_the_error_bar_is_the_standard_deviation_over_draws():
    """The metric is a mean's squared distance from a distant reference. Its standard deviation is 2 |d| s / sqrt(n)."""
    generator = torch.Generator().manual_seed(0)
    reference = Summary(10, {}, statistics=Statistics(np.full(3, 5.0), np.eye(3) * 1e-4, 10))
    estimates, values = [], []
    for _ in range(30):
        images = torch.randint(256, (400, 3, 1, 1), generator=generator, dtype=torch.uint8)
        gatherer = Gatherer(Pixels(), ["moments"], grouped=True)
        for part in images.split(37):
            gatherer.update(part)
        errors = error_bars(["fid"], lambda groups, gatherer=gatherer: gatherer.summary({}, groups), reference)
        values.append(compute_metrics(["fid"], gatherer.summary(), reference)["fid"])
        estimates.append(errors["fid"])
    assert np.sqrt(np.mean(np.square(estimates))) == pytest.approx(np.std(values), rel=0.25)


def test_groups_are_balanced_for_any_order_of_classes():
    from evaluation.summary import _group_of

    for step in (1, 2, 8, 10, 64):
        counts = torch.bincount(_group_of(torch.arange(0, 8000 * step, step)), minlength=GROUPS)
        assert counts.min() > 900, step
        assert counts.max() < 1100, step


def test_psnr():
    assert psnr(4.0) == 0
    assert psnr(0.04) == pytest.approx(20)
    assert psnr(1.0, value_range=1) == 0
    assert psnr(0.0) == math.inf
