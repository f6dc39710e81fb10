"""Guidance intervals, whose ends are jumps of the velocity, compared with closed forms integrated piece by piece.

Data are two classes N(-1, 0.5^2) and N(2, 0.5^2) in every dimension. The reference integrates [1, 0.7], [0.7, 0.2] and
[0.2, 0] one after another, each with a velocity that is guided always or never.
"""

import math
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torchdiffeq

from flow.grids import GRIDS, time_grid
from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.likelihood import log_likelihood
from flow.ode import breakpoints_of, restrict
from flow.repaint import replace_known
from flow.solvers import SOLVERS, SolverOptions, solve

LOW, HIGH, SCALE = 0.2, 0.7, 4.0
MEANS, SPREAD = (-1.0, 2.0), 0.5
NOISE = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])
NULL = 9
# (order, evaluations per step, further evaluations at the start of each of the three pieces)
METHODS = {
    "euler": (1, 1, 0),
    "midpoint": (2, 2, 0),
    "heun": (2, 2, 0),
    "rk3": (3, 3, 0),
    "rk4": (4, 4, 0),
    "ab2": (2, 1, 0),
    "multistep": (2, 1, 0),
    "ab3": (3, 1, 2),
    "ab4": (4, 1, 6),
    "dpm": (2, 1, 0),
}
FIXED = [name for name, method in SOLVERS.items() if not method.adaptive]
ADAPTIVE = [name for name, method in SOLVERS.items() if method.adaptive]


class Labels(NamedTuple):
    labels: torch.Tensor


def mixture(t, x, condition, until=None):
    """The exact velocity of each class and, for the null label, of both; `until` has no effect."""
    t = t.view(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    centered = torch.stack([x - (1 - t) * mean for mean in MEANS], -1)
    each = ((t - (1 - t) * SPREAD**2) / variance)[..., None] * centered - torch.tensor(MEANS, dtype=x.dtype)
    shares = torch.softmax(-centered.square() / (2 * variance[..., None]), -1)
    labels = condition.labels.view(-1, 1, 1, 1)
    one = torch.where(labels == 0, each[..., 0], each[..., 1])
    return torch.where(labels == NULL, (shares * each).sum(-1), one)


def guided(rows=slice(None), interval=(LOW, HIGH), scale=SCALE, network=mixture):
    labels = LABELS[rows]
    return GuidedVelocity(
        network, Labels(labels), Labels(torch.full_like(labels, NULL)), GuidanceOptions(scale, interval)
    )


def integrate(x, pieces):
    """Integrate x over pieces (start, end, guided), with torchdiffeq and tight tolerances."""
    for start, end, on in pieces:
        velocity = guided(interval=(0.0, 1.0), scale=SCALE if on else 1.0)
        ends = torch.tensor([start, end], dtype=x.dtype)
        x = torchdiffeq.odeint(velocity, x, ends, method="dopri5", atol=1e-11, rtol=1e-11)[-1]
    return x


@cache
def exact():
    return integrate(NOISE, [(1, HIGH, False), (HIGH, LOW, True), (LOW, 0, False)])


def error_of(method, steps=1, **settings):
    return (solve(guided(), NOISE, SolverOptions(method, steps, **settings)).x - exact()).abs().max().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"time_grid": "quadratic"}, {"time_shift": 2.0}], ids=str)
def test_fixed_step_methods_keep_their_order(method, settings):
    """Without breakpoints, every method has order 1. Uniform grids of 83 and 166 steps do not contain the ends."""
    coarse, fine = (error_of(method, steps, **settings) for steps in (83, 166))
    assert math.log2(coarse / fine) > METHODS[method][0] - (0.6 if method in ("ab4", "dpm") else 0.2)


def test_errors_at_40_steps():
    """With steps across the ends, errors were 2e-2 for heun, ab2, ab3, ab4 and dpm, and 5e-3 for rk3 and rk4."""
    bounds = {"heun": 5e-3, "ab2": 1.2e-2, "ab3": 2e-3, "ab4": 2e-3, "dpm": 1.4e-2, "rk3": 3e-4, "rk4": 1e-5}
    for method, most in bounds.items():
        assert error_of(method, 40) < most, method


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_reach_their_tolerance(method):
    """torchdiffeq's interpolation at the end limits dopri8 and bosh3."""
    assert error_of(method, atol=1e-3, rtol=1e-3) < 5e-2
    assert error_of(method, atol=1e-6, rtol=1e-6) < (1e-3 if method in ("dopri8", "bosh3") else 5e-5)


def test_adaptive_methods_do_not_search_for_the_jumps():
    """With one step size across the ends, dopri5 took 199 evaluations."""
    solution = solve(guided(), NOISE, SolverOptions("dopri5"))
    assert (solution.evaluations < 110).all()
    assert ((solution.evaluations - 3 * 2) % 6 == 0).all()  # each piece starts with two evaluations


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_a_sample_does_not_depend_on_its_batch(tolerance):
    """A real network rounds differently in batches of different shapes. Jumps inside a step would amplify the difference."""

    def rounded(t, x, condition):
        return mixture(t, x, condition) + 1e-7 * math.sin(len(x))

    options = SolverOptions("dopri5", atol=tolerance, rtol=tolerance)
    together = solve(guided(network=rounded), NOISE, options)
    for row in range(len(NOISE)):
        rows = slice(row, row + 1)
        alone = solve(guided(rows, network=rounded), NOISE[rows], options)
        assert alone.evaluations[0] == together.evaluations[row]
        torch.testing.assert_close(alone.x[0], together.x[row], rtol=0, atol=3e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [20, 44])
def test_evaluations_and_guided_evaluations(method, steps):
    """Half of the steps are within the interval. Multistep methods of order 3 and above start afresh in each piece."""
    _, per_step, start = METHODS[method]
    velocity = guided()
    solution = solve(velocity, NOISE, SolverOptions(method, steps))
    assert solution.evaluations.tolist() == [per_step * steps + 3 * start] * 6
    assert velocity.evaluations(6).tolist() == [per_step * steps * 3 // 2 + 4 * start] * 6


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ["heun", "rk4", "torchdiffeq_dopri5"])
def test_all_stages_of_a_step_are_on_the_same_side(method, backwards):
    calls = []

    def network(t, x, condition):
        calls.append((t[0].item(), len(x) > len(NOISE)))
        return mixture(t, x, condition)

    solve(guided(network=network), NOISE, SolverOptions(method, 10), backwards=backwards)
    switches = [time for (_, before), (time, now) in pairwise(calls) if before != now]
    assert switches == [LOW, HIGH] if backwards else [HIGH, LOW]
    if method != "torchdiffeq_dopri5":  # which also looks beyond the end of a piece
        assert all(LOW <= time <= HIGH for time, on in calls if on)
        assert not any(LOW < time < HIGH for time, on in calls if not on)


@pytest.mark.parametrize("method", ["rk4", "ab4", "dopri5", "torchdiffeq_dopri5"])
def test_integrating_backwards(method):
    options = SolverOptions(method, 100, atol=1e-7, rtol=1e-7)
    backwards = [(0, LOW, False), (LOW, HIGH, True), (HIGH, 1, False)]
    x = solve(guided(), exact(), options, backwards=True).x
    torch.testing.assert_close(x, integrate(exact(), backwards), rtol=0, atol=1e-4)
    torch.testing.assert_close(x, NOISE, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "torchdiffeq_dopri5"])
def test_likelihood_of_a_guided_flow(method):
    """log p(data) = log N(noise) + log |d noise / d data|, with the derivative from differences of the exact flow."""
    data, step = exact()[:2], 1e-4
    pieces = [(0, LOW, False), (LOW, HIGH, True), (HIGH, 1, False)]
    shifted = [integrate(exact() + sign * step, pieces)[:2] for sign in (1, -1)]  # every dimension flows by itself
    slopes = (shifted[0] - shifted[1]) / (2 * step)
    normal = -0.5 * (NOISE[:2].square() + math.log(2 * math.pi))
    likelihood = log_likelihood(guided(slice(2)), data, SolverOptions(method, 40, atol=1e-7, rtol=1e-7))
    expected = (normal + slopes.log()).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.log_density, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [{"method": "stochastic"}, {"method": "heun", "churn": 8.0}], ids=str)
def test_every_step_draws_its_own_noise(settings):
    asked = []

    def draw(step):
        asked.append(step)
        return torch.zeros_like(NOISE)

    solve(guided(), NOISE, SolverOptions(num_steps=20, **settings), draw=draw)
    expected = range(1, 20) if "churn" in settings else range(19)  # no churn at t = 1; no noise in the last step
    assert asked == list(expected)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_without_a_fitted_grid_every_evaluation_decides_by_its_time(method):
    seen = []

    def network(t, x, condition):
        seen.append((round(t[0].item(), 9), len(x)))
        return 0 * x

    solve(guided(interval=(0.25, 0.55), network=network), NOISE, SolverOptions(method, 4, fit_grid=False))
    times = [1, 0.75, 0.5, 0.25] if method == "euler" else [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0]
    assert seen == [(t, len(NOISE) * (2 if 0.25 <= t <= 0.55 else 1)) for t in times]


def test_churn_is_spread_over_the_steps_of_all_pieces():
    """For zero velocity, churned x is scaled by the ratio of the data shares. An interval does not change it."""
    still = SolverOptions("heun", 20, churn=4.0)

    def draw(step):
        return torch.zeros_like(NOISE)

    plain = solve(guided(network=lambda t, x, c: 0 * x, scale=1.0), NOISE, still, draw=draw).x
    split = solve(guided(network=lambda t, x, c: 0 * x), NOISE, still, draw=draw).x
    torch.testing.assert_close(split, plain)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [3, 4, 9, 100])
@pytest.mark.parametrize("ends", [(0.7, 0.2), (0.5,), (0.999, 0.998), (0.003, 0.001)])
def test_grids_reach_the_breakpoints_with_the_same_number_of_steps(name, steps, ends):
    times = time_grid(SolverOptions("euler", steps, time_grid=name), ends)
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, steps + 1)
    assert set(ends) <= set(times)
    assert (torch.tensor(times, dtype=torch.float64).diff() < 0).all()


def test_only_the_nearest_grid_points_move_onto_the_breakpoints():
    times = time_grid(SolverOptions("euler", 8), (0.7, 0.2))
    assert times == pytest.approx([1, 0.85, 0.7, 0.575, 0.45, 0.325, 0.2, 0.1, 0])
    assert time_grid(SolverOptions("euler", 10), (0.7, 0.2)) == pytest.approx(time_grid(SolverOptions("euler", 10)))
    assert time_grid(SolverOptions("euler", 2), (0.7, 0.2)) == [1, 0.5, 0]  # too few steps


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_few_steps_are_still_allowed(method, steps):
    """With too few steps to reach both ends, each step is guided if its middle is inside the interval."""
    velocity = guided()
    solution = solve(velocity, NOISE, SolverOptions(method, steps), draw=torch.zeros_like(NOISE).add)
    assert solution.x.isfinite().all()
    shares = {1: [True], 2: [False, True], 3: [False, True, False]}[steps]
    once = solution.evaluations[0] // steps
    assert velocity.evaluations(6).tolist() == [sum(once * (1 + on) for on in shares)] * 6


@pytest.mark.parametrize(
    ("interval", "scale", "expected"),
    [
        ((0.2, 0.7), 4.0, [0.7, 0.2]),
        ((0.0, 0.7), 4.0, [0.7]),
        ((0.2, 1.0), 4.0, [0.2]),
        ((0.0, 1.0), 4.0, []),
        ((0.2, 0.7), 1.0, []),
        ((0.5, 0.5), 4.0, []),
        ((0.5, 0.5 + 1e-9), 4.0, [0.5 + 1e-9]),
        ((1e-9, 1 - 1e-9), 4.0, []),
    ],
)
def test_breakpoints(interval, scale, expected):
    velocity = guided(interval=interval, scale=scale)
    assert breakpoints_of(velocity) == expected
    assert breakpoints_of(restrict(velocity, 1, 0.7)) == []
    assert breakpoints_of(velocity.select_rows(torch.tensor([1]))) == expected
    for method in ("euler", "ab3", "dopri5", "torchdiffeq_dopri5"):
        assert solve(velocity, NOISE.float(), SolverOptions(method, 6)).x.isfinite().all()


def test_an_interval_without_length_never_guides():
    x = solve(guided(interval=(0.5, 0.5)), NOISE, SolverOptions("euler", 8)).x
    assert torch.equal(x, solve(guided(scale=1.0), NOISE, SolverOptions("euler", 8)).x)


def test_a_velocity_without_breakpoints_is_passed_to_the_solver_unchanged():
    def velocity(t, x):
        return torch.sin(3 * x) + t

    assert breakpoints_of(velocity) == []
    assert restrict(velocity, 1, 0.5) is velocity
    always = guided(interval=(0.0, 1.0))
    assert torch.equal(restrict(always, 1, 0.5)(torch.tensor(0.3), NOISE), always(torch.tensor(0.3), NOISE))


def test_repaint_decides_once_per_step():
    velocity = guided()
    times = time_grid(SolverOptions("euler", 10), breakpoints_of(velocity))
    hole = torch.ones(6, 1, 2, 2, dtype=torch.bool)
    solution = replace_known(velocity, NOISE, times, NOISE, hole, torch.zeros_like(NOISE).add)
    assert torch.equal(solution.x, solve(guided(), NOISE, SolverOptions("euler", 10)).x)
    assert velocity.evaluations(6).tolist() == [15] * 6


@pytest.mark.parametrize("method", ["ab2", "dpm"])
def test_a_breakpoint_after_the_end_of_the_grid_changes_nothing(method):
    options = SolverOptions(method, 9, end_time=0.1)
    found, expected = (solve(guided(interval=(low, HIGH)), NOISE, options) for low in (0.05, 0.0))
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.evaluations, expected.evaluations)
