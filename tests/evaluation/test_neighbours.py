import pytest
import torch

from evaluation.neighbours import neighbour_scores
from evaluation.summary import Summary


def rows(count: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) * scale + shift


def summary(values: torch.Tensor) -> Summary:
    return Summary(len(values), {}, rows=values)


def brute_force(samples: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    def radius(of: torch.Tensor, index: int, k: int) -> float:
        return sorted(float((row - of[index]).norm()) for place, row in enumerate(of) if place != index)[k - 1]

    def held(point: torch.Tensor, by: torch.Tensor, k: int) -> int:
        return sum(float((point - center).norm()) <= radius(by, index, k) for index, center in enumerate(by))

    return {
        "precision": sum(held(x, real, 3) > 0 for x in samples) / len(samples),
        "recall": sum(held(x, samples, 3) > 0 for x in real) / len(real),
        "density": sum(held(x, real, 5) for x in samples) / (5 * len(samples)),
        "coverage": sum(
            any(float((x - y).norm()) <= radius(real, index, 5) for x in samples) for index, y in enumerate(real)
        )
        / len(real),
    }


def test_scores_equal_brute_force(monkeypatch):
    samples, real = rows(17, 0, 0.7, 0.5), rows(23, 1)
    expected = brute_force(samples, real)
    assert len(set(expected.values())) == 4
    assert min(expected.values()) > 0
    for chunk in (1000, 4):
        monkeypatch.setattr("evaluation.neighbours.CHUNK", chunk)
        assert neighbour_scores(summary(samples), summary(real)) == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_equal_torch_fidelitys():
    from torch_fidelity.metric_prc import prc_features_to_metric

    samples, real = rows(300, 0, 0.7, 0.5), rows(400, 1)
    theirs = prc_features_to_metric(samples, real, prc_neighborhood=3, verbose=False)
    ours = neighbour_scores(summary(samples), summary(real))
    assert 0.2 < ours["recall"] < 0.9
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_a_set_compared_with_itself_and_with_a_distant_set():
    near, far = rows(50, 0), rows(50, 1, shift=1000.0)
    assert neighbour_scores(summary(near), summary(near))["precision"] == 1
    assert set(neighbour_scores(summary(near), summary(far)).values()) == {0}
