"""Bounds hold for normal distributions and mixtures, where flows, errors, rates and distances are known."""

import itertools
import math

import pytest
import torch

from flow.bounds import decoded_bound, flow_bound, lfm_bound, young_bound
from flow.empirical import Components, EmpiricalVelocity
from flow.lipschitz import logarithmic_norm

DIMENSIONS, INTERVALS = 3, 400
WIDTHS = torch.full((INTERVALS,), 1 / INTERVALS, dtype=torch.float64)
TIMES = WIDTHS.cumsum(0) - WIDTHS / 2


def slope(std: float) -> torch.Tensor:
    """dv/dx of the flow to N(mean, std^2), at TIMES."""
    return (TIMES - (1 - TIMES) * std**2) / ((1 - TIMES) ** 2 * std**2 + TIMES**2)


def normal_case(
    mean: float, std: float, other_mean: float, other_std: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Errors and rates of the flow to N(other_mean, other_std^2) against data N(mean, std^2), and their W2."""
    a, b = slope(std), slope(other_std)
    shift = lambda c, m: -c * (1 - TIMES) * m - m  # noqa: E731 - v = c x + shift
    center = (a - b) * (1 - TIMES) * mean + shift(a, mean) - shift(b, other_mean)
    spread = (a - b).square() * ((1 - TIMES) ** 2 * std**2 + TIMES**2)
    errors = (DIMENSIONS * (center.square() + spread)).sqrt()
    return errors, -b, math.sqrt(DIMENSIONS * ((mean - other_mean) ** 2 + (std - other_std) ** 2))


CASES = list(itertools.product((0.0, 1.0), (0.3, 1.0), (0.0, -0.5), (0.2, 0.9, 1.5)))


@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_above_the_distance_of_normal_distributions(case: tuple[float, float, float, float]) -> None:
    errors, rates, distance = normal_case(*case)
    bound = flow_bound(errors, rates, WIDTHS).item()
    assert bound >= distance * (1 - 1e-3)
    assert young_bound(errors, rates, WIDTHS).item() >= bound
    assert lfm_bound(0.0, 1.0, errors, slope(case[3]).abs().max().item(), WIDTHS) >= distance * (1 - 1e-3)


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_the_bound_is_exact_for_a_shift(std: float) -> None:
    # Flows to two normal distributions with the same spread: the error has one direction, and all paths spread alike.
    errors, rates, distance = normal_case(0.0, std, 0.7, std)
    assert flow_bound(errors, rates, WIDTHS).item() == pytest.approx(distance, rel=1e-3)


def test_a_constant_rate_gives_the_known_integral() -> None:
    errors = torch.ones(INTERVALS, dtype=torch.float64)
    assert flow_bound(errors, 2 * errors, WIDTHS).item() == pytest.approx((math.exp(2) - 1) / 2, rel=1e-4)
    assert young_bound(errors, errors, WIDTHS).item() == pytest.approx(math.sqrt((math.exp(3) - 1) / 3), rel=1e-4)


def test_paths_are_bounded_one_by_one() -> None:
    errors, rates = torch.rand(INTERVALS, 2), torch.randn(INTERVALS, 2)
    both = flow_bound(errors, rates, WIDTHS)
    for path in range(2):
        torch.testing.assert_close(both[path], flow_bound(errors[:, path], rates[:, path], WIDTHS))


def test_pixels_add_the_reconstruction_error() -> None:
    assert decoded_bound(0.5, 2.0, 3.0) == 6.5
    errors = torch.full((INTERVALS,), 3.0)
    assert lfm_bound(0.5, 2.0, errors, -0.5, WIDTHS) == pytest.approx(math.hypot(0.5, 6.0))
    assert lfm_bound(0.0, 1.0, errors, 1000.0, WIDTHS) == math.inf


def test_the_bound_along_paths_holds_for_mixtures() -> None:
    # Flows of two mixtures from the same noise end at most the bound apart, path by path.
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 2, 1, 1, generator=generator, dtype=torch.float64)
    exact = EmpiricalVelocity(lambda: [Components(mean, torch.full_like(mean, 0.4), torch.zeros(4))])
    moved = mean + 0.3 * torch.randn(4, 2, 1, 1, generator=generator, dtype=torch.float64)
    network = EmpiricalVelocity(lambda: [Components(moved, torch.full_like(mean, 0.5), torch.zeros(4))])
    count = 50
    widths = torch.full((count,), 1 / count, dtype=torch.float64)
    z = other = torch.randn(16, 2, 1, 1, generator=generator, dtype=torch.float64)
    errors, rates = [], []
    for step in range(count):
        start, middle, end = (1 - (step + part) / count for part in (0, 0.5, 1))
        both = []
        for velocity, x in ((exact, z), (network, other)):
            half = x + (middle - start) * velocity(torch.tensor(start, dtype=torch.float64), x)
            both.append((x + (end - start) * velocity(torch.tensor(middle, dtype=torch.float64), half), half))
        (z, at), (other, beside) = both
        time = torch.tensor(middle, dtype=torch.float64)
        errors.append((exact(time, at) - network(time, at)).flatten(1).norm(dim=1))
        between = torch.stack(
            [
                logarithmic_norm(
                    lambda x, time=time: network(time, x), at + share * (beside - at), torch.ones_like(at), 2
                )
                for share in torch.linspace(0, 1, 5).tolist()
            ]
        )
        rates.append(between.amax(0))
    bound = flow_bound(torch.stack(errors[::-1]), torch.stack(rates[::-1]), widths)
    apart = (z - other).flatten(1).norm(dim=1)
    assert (bound >= 0.98 * apart).all()
    assert (bound < 5 * apart).any()  # and it says something
