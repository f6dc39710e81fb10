"""RePaint: known pixels are exact, and more resamplings bring the hole closer to the conditional mean."""

import pytest
import torch

from flow.repaint import _renoise, replace_known
from flow.solvers import SolverOptions, solve

SHAPE = (3, 2, 4, 4)


def noise(number, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def curved(t, x):
    return torch.sin(3 * x) + t * x.flip(-1) - 0.5


KNOWN = noise(100)
NOWHERE, EVERYWHERE = torch.zeros(3, 1, 4, 4, dtype=torch.bool), torch.ones(3, 1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize("resamplings", [1, 3])
def test_without_a_hole_the_result_is_the_known_image(resamplings):
    solution = replace_known(curved, noise(0), [1, 0.6, 0.3, 0], KNOWN, NOWHERE, noise, resamplings=resamplings)
    assert torch.equal(solution.x, KNOWN)


def test_a_full_hole_without_resampling_gives_eulers_method():
    times = [1, 0.75, 0.5, 0.25, 0]
    solution = replace_known(curved, noise(0), times, KNOWN, EVERYWHERE, noise)
    expected = solve(curved, noise(0), SolverOptions("euler", 4))
    assert torch.equal(solution.x, expected.x)
    assert torch.equal(solution.evaluations, expected.evaluations)
    other = replace_known(curved, noise(0), times, noise(101), EVERYWHERE, noise)
    assert torch.equal(other.x, solution.x)  # known pixels do not matter inside the hole


@pytest.mark.parametrize("resamplings", [1, 2, 5])
def test_known_pixels_are_exact_and_draws_are_never_reused(resamplings):
    hole = noise(7, (3, 1, 4, 4)) > 0
    calls, asked = [], []

    def velocity(t, x):
        calls.append(float(t))
        return curved(t, x)

    def draw(number):
        asked.append(number)
        return noise(number)

    times = [1, 0.7, 0.4, 0]
    solution = replace_known(velocity, noise(0), times, KNOWN, hole, draw, resamplings=resamplings)
    outside = ~hole.expand(SHAPE)
    assert torch.equal(solution.x[outside], KNOWN[outside])
    assert not torch.isclose(solution.x[~outside], KNOWN[~outside]).any()
    assert solution.evaluations.tolist() == [3 * resamplings] * 3
    assert calls == pytest.approx([t for t in times[:-1] for _ in range(resamplings)])
    assert len(set(asked)) == len(asked)
    assert max(asked, default=0) < 2 * 3 * resamplings
    other = torch.where(hole, noise(55), KNOWN)  # changes `known` only inside the hole
    again = replace_known(curved, noise(0), times, other, hole, noise, resamplings=resamplings)
    assert torch.equal(again.x, solution.x)


@pytest.mark.parametrize("sigma_min", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.2, 0.5), (0.7, 0.71), (0.6, 1.0)])
def test_going_back_adds_the_noise_of_the_path(s, t, sigma_min):
    """a_s data + b_s noise at s becomes a_t data + b_t noise at t. Unit data and unit noise reveal the coefficients."""
    clean = {time: (1 - time, sigma_min + (1 - sigma_min) * time) for time in (s, t)}
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    share_of_data = _renoise(clean[s][0] * one, s, t, zero, sigma_min).item()
    variance = (
        _renoise(clean[s][1] * one, s, t, zero, sigma_min).square() + _renoise(zero, s, t, one, sigma_min).square()
    )
    assert share_of_data == pytest.approx(clean[t][0], abs=1e-12)
    assert variance.item() == pytest.approx(clean[t][1] ** 2, rel=1e-9)


CORRELATION, GIVEN, STEPS = 0.9, 1.5, 16
COVARIANCE = torch.tensor([[1, CORRELATION], [CORRELATION, 1]], dtype=torch.float64)


def gaussian_velocity(t, x):
    """The velocity E[noise - data | x_t] for data N(0, COVARIANCE) and sigma_min = 0. The two pixels are next to each other."""
    a, b, eye = 1 - t, t, torch.eye(2, dtype=torch.float64)
    slope = (b * eye - a * COVARIANCE) @ torch.linalg.inv(a**2 * COVARIANCE + b**2 * eye)
    return x @ slope.T


def mean_of_the_hole(resamplings):
    """Mean of the right pixel if the left one is GIVEN. Everything is linear, so it is the sample for zero noise."""
    start = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    hole = torch.tensor([[[[False, True]]]])
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64).tolist()
    settings = {"resamplings": resamplings, "sigma_min": 0.0}
    known = torch.full_like(start, GIVEN)
    return replace_known(gaussian_velocity, start, times, known, hole, lambda _: start, **settings).x[..., 1].item()


def test_resampling_approaches_the_conditional_mean():
    errors = [CORRELATION * GIVEN - mean_of_the_hole(resamplings) for resamplings in (1, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5  # without resampling, the hole barely depends on its surroundings
    assert 0 < errors[-1] < 0.02
