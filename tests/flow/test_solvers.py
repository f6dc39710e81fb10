"""Solvers compared with closed forms.

For data N(m, s^2) and the straight path with sigma_min = 0, x_t is N((1 - t) m, r(t)^2) with r^2 = (1 - t)^2 s^2 + t^2. The
exact velocity is E[noise - data | x_t]. Its flow preserves (x_t - (1 - t) m) / r(t), so noise z becomes the sample m + s z.
"""

import math

import pytest
import torch
import torchdiffeq

from flow.solvers import SOLVERS, SolverOptions, solve
from options import UsageError

MEAN, SPREAD = 0.7, 0.4
# (order, evaluations per step)
FIXED = {"euler": (1, 1), "midpoint": (2, 2), "heun": (2, 2), "rk3": (3, 3), "rk4": (4, 4)}
# (order, evaluations in addition to one per step)
MULTISTEP = {"ab2": (2, 0), "ab3": (3, 2), "ab4": (4, 6), "multistep": (2, 0)}
ADAPTIVE = ("dopri5", "torchdiffeq_dopri5", "dopri8", "adaptive_heun", "bosh3")
OTHERS = (
    "dpm",
    "stochastic",
    "euler_maruyama",
    "flow_map",
)  # tested in test_multistep.py, test_stochastic.py and test_few_steps.py
NOISE = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian_velocity(t, x):
    t = t.view(-1, *[1] * (x.ndim - 1))
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (t - (1 - t) * SPREAD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def error_of(method, steps, **settings):
    solution = solve(gaussian_velocity, NOISE, SolverOptions(method, steps, **settings))
    return (solution.x - (MEAN + SPREAD * NOISE)).abs().max().item()


def evaluated_times(method, **settings):
    times = []

    def velocity(t, x):
        times.append(t.flatten()[0].item())
        return torch.zeros_like(x)

    evaluations = solve(velocity, NOISE, SolverOptions(method, **settings)).evaluations
    assert evaluations.tolist() == [len(times)] * 3
    return times


def test_every_solver_is_tested():
    assert set(SOLVERS) == {*FIXED, *MULTISTEP, *ADAPTIVE, *OTHERS}


@pytest.mark.parametrize("time_shift", [1.0, 0.5])
@pytest.mark.parametrize("method", [*FIXED, *MULTISTEP])
def test_the_error_decreases_at_the_methods_order(method, time_shift):
    """Solves dx/dt = (1 + t) x with x(0) = x(1) exp(-3/2). On Gaussian data, midpoint would happen to have order 3."""
    exact = NOISE * math.exp(-1.5)
    coarse, fine = (
        solve(lambda t, x: (1 + t) * x, NOISE, SolverOptions(method, steps, time_shift=time_shift)).x - exact
        for steps in (128, 256)
    )
    coarse, fine = coarse.abs().max().item(), fine.abs().max().item()
    assert abs(math.log2(coarse / fine) - {**FIXED, **MULTISTEP}[method][0]) < 0.2


@pytest.mark.parametrize(("method", "most"), [("euler", 3e-2), ("midpoint", 2e-6), ("heun", 2e-4), ("rk4", 4e-9)])
def test_the_exact_velocity_of_gaussian_data_gives_that_gaussian(method, most):
    assert error_of(method, 64) < most


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_solvers_reach_the_closed_form_within_their_tolerance(method):
    loose, tight = (error_of(method, 1, atol=tolerance, rtol=tolerance) for tolerance in (1e-3, 1e-6))
    assert tight < 2e-4
    assert tight < loose < 3e-2


def test_adaptive_solvers_need_more_evaluations_for_a_lower_tolerance():
    few, many = (
        solve(gaussian_velocity, NOISE, SolverOptions("dopri5", atol=tolerance, rtol=tolerance)).evaluations
        for tolerance in (1e-3, 1e-7)
    )
    assert (few < many).all()


@pytest.mark.parametrize("method", ["midpoint", "heun", "rk4", "dopri5"])
@pytest.mark.parametrize("time_shift", [1.0, 3.0])
def test_velocities_linear_in_time_are_integrated_exactly(method, time_shift):
    slope = torch.linspace(-1, 2, NOISE.numel(), dtype=torch.float64).view_as(NOISE)
    x = solve(lambda t, x: 0.5 + slope * t.view(-1, 1, 1, 1), NOISE, SolverOptions(method, 3, time_shift=time_shift)).x
    torch.testing.assert_close(x, NOISE - 0.5 - slope / 2, rtol=0, atol=1e-12 if method in FIXED else 1e-6)


def test_euler_is_exact_only_for_straight_trajectories():
    direction = NOISE - 3
    straight = solve(lambda t, x: direction, NOISE, SolverOptions("euler", 1)).x
    torch.testing.assert_close(straight, torch.full_like(NOISE, 3), rtol=0, atol=1e-14)
    # For velocity t, Euler's sum over N steps from 1 to 0 is (1 + 1/N) / 2.
    curved = solve(lambda t, x: t.expand_as(x), NOISE, SolverOptions("euler", 4)).x
    torch.testing.assert_close(curved, NOISE - (1 + 1 / 4) / 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_fixed_steps_equal_those_of_torchdiffeq(method):
    """heun is not compared here: torchdiffeq's heun2 has the same tableau, and its heun3 is a different method."""
    grid = torch.linspace(1, 0, 9, dtype=torch.float64)
    reference = torchdiffeq.odeint(gaussian_velocity, NOISE, grid, method=method)[-1]
    torch.testing.assert_close(
        solve(gaussian_velocity, NOISE, SolverOptions(method, 8)).x, reference, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("steps", [1, 5])
def test_evaluations_of_fixed_step_solvers(method, steps):
    times = evaluated_times(method, num_steps=steps)
    assert len(times) == FIXED[method][1] * steps
    assert times[0] == 1
    assert min(times) >= 0


@pytest.mark.parametrize("method", MULTISTEP)
@pytest.mark.parametrize("steps", [3, 7])
def test_multistep_methods_take_one_evaluation_per_step_after_starting(method, steps):
    assert len(evaluated_times(method, num_steps=steps)) == MULTISTEP[method][1] + steps


@pytest.mark.parametrize("shift", [0.3, 1.0, 2.5])
def test_grid_of_a_shift(shift):
    """t' = s t / (1 + (s - 1) t) keeps the end points. A shift below 1 shortens the steps near data."""
    times = [*evaluated_times("euler", num_steps=8, time_shift=shift), 0.0]
    uniform = [1 - i / 8 for i in range(9)]
    assert times == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in uniform], abs=1e-12)
    assert times[0] == 1
    last = times[-2]
    assert (last < 1 / 8) if shift < 1 else (last >= 1 / 8)
    assert evaluated_times("heun", num_steps=8, time_shift=shift)[-1] == 0


@pytest.mark.parametrize("method", FIXED)
def test_step_size_determines_the_number_of_steps(method):
    by_size = solve(gaussian_velocity, NOISE, SolverOptions(method, num_steps=3, step_size=1 / 7))
    by_number = solve(gaussian_velocity, NOISE, SolverOptions(method, num_steps=7))
    assert torch.equal(by_size.x, by_number.x)
    assert torch.equal(by_size.evaluations, by_number.evaluations)


def test_a_step_size_that_does_not_divide_the_interval_is_rounded():
    assert len(evaluated_times("euler", step_size=0.3)) == 3
    assert len(evaluated_times("euler", step_size=5.0)) == 1


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_float32_noise_stays_float32(method):
    solution = solve(gaussian_velocity, NOISE.float(), SolverOptions(method, 64))
    assert solution.x.dtype == torch.float32
    torch.testing.assert_close(solution.x, (MEAN + SPREAD * NOISE).float(), rtol=0, atol=3e-2)


def test_no_gradients_are_recorded():
    weight = torch.ones((), requires_grad=True, dtype=torch.float64)
    assert not solve(lambda t, x: weight * x, NOISE, SolverOptions("euler", 2)).x.requires_grad


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(
        UsageError, match="unknown --method 'eular': expected one of euler, midpoint, heun, rk3, rk4, ab2"
    ):
        solve(gaussian_velocity, NOISE, SolverOptions("eular"))
