import math

import numpy as np
import pytest

from evaluation.metrics import frechet_distance, psnr
from evaluation.statistics import Statistics
from options import UsageError


def random_statistics(seed: int, dims: int, count: int = 100_000) -> Statistics:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(3 * dims, dims)) @ generator.normal(size=(dims, dims))
    return Statistics(rows.mean(0), np.cov(rows, rowvar=False), count)


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


def test_singular_covariances_are_admitted_with_a_note(capsys):
    rows = np.random.default_rng(0).normal(size=(5, 32))
    few = Statistics(rows.mean(0), np.cov(rows, rowvar=False), 5)
    moved = Statistics(few.mean + 1, few.covariance, 5)
    assert frechet_distance(few, moved) == pytest.approx(32, rel=1e-9)
    assert "5 images are too few for 32 features" in capsys.readouterr().err


def test_statistics_of_different_features_are_refused():
    with pytest.raises(UsageError, match="2 with statistics of 3"):
        frechet_distance(random_statistics(1, 2), random_statistics(1, 3))
    a, b = (
        Statistics(np.zeros(2), np.eye(2), 10, {"features": {"name": "inception", "sha256": letter * 64}})
        for letter in "ab"
    )
    with pytest.raises(UsageError, match="aaaaaaaa and inception bbbbbbbb"):
        frechet_distance(a, b)


def test_psnr():
    assert psnr(4.0) == 0
    assert psnr(0.04) == pytest.approx(20)
    assert psnr(1.0, value_range=1) == 0
    assert psnr(0.0) == math.inf
