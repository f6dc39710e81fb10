"""Distances of points agree with closed forms and with each other."""

import itertools
import math

import pytest
import torch

from evaluation.wasserstein import exact_distance, over_subsets, sinkhorn_distance, sliced_distance


def points(count: int, dimensions: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_the_exact_distance_is_that_of_the_best_assignment() -> None:
    a, b = points(5, 3, 0), points(5, 3, 1)
    costs = torch.cdist(a.double(), b.double()).square()
    best = min(
        sum(costs[row, column].item() for row, column in enumerate(order)) for order in itertools.permutations(range(5))
    )
    assert exact_distance(a, b) == pytest.approx(math.sqrt(best / 5))


@pytest.mark.parametrize("distance", [exact_distance, sinkhorn_distance, sliced_distance])
def test_a_shift_has_its_length_as_distance(distance) -> None:
    a = points(200, 4, 0)
    shift = torch.tensor([3.0, 0, 0, 4])
    expected = 5 / (2 if distance is sliced_distance else 1)  # sliced: divided by sqrt(D) on average over directions
    assert distance(a, a + shift) == pytest.approx(expected, rel=0.05)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)


def test_order_does_not_matter() -> None:
    a, b = points(30, 3, 0), points(30, 3, 1)
    assert exact_distance(a, b.flip(0)) == pytest.approx(exact_distance(a, b))
    assert sliced_distance(a, b.flip(0)) == pytest.approx(sliced_distance(a, b))


def test_the_distance_of_normal_distributions_in_one_dimension() -> None:
    a, b = points(4000, 1, 0), 1 + 2 * points(4000, 1, 1)
    assert exact_distance(a[:1000], b[:1000]) == pytest.approx(math.sqrt(2), abs=0.1)
    assert sliced_distance(a, b) == pytest.approx(math.sqrt(2), abs=0.06)


def test_subsets_give_a_mean_and_its_error() -> None:
    a, b = points(400, 2, 0), points(400, 2, 1) + 1
    mean, error = over_subsets(exact_distance, a, b, 4)
    parts = [exact_distance(a[i : i + 100], b[i : i + 100]) for i in range(0, 400, 100)]
    assert mean == pytest.approx(sum(parts) / 4)
    assert 0 < error < 0.2
