"""Sampling by a flow map: exact for Gaussian data in any number of steps, with guidance and with fresh noise."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from flow.grids import GRIDS, time_grid
from flow.guidance import GuidanceOptions, GuidedVelocity, VelocityNetwork
from flow.losses.options import FlowMatchingOptions
from flow.objectives import FlowMatching
from flow.solvers import SolverOptions, check_method, solve
from options import UsageError, as_json

MEAN, SPREAD = 0.7, 0.4  # of the data
NOISE = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NULL = 9


class Labels(NamedTuple):
    labels: torch.Tensor


def deviation(t):
    return ((1 - t) ** 2 * SPREAD**2 + t**2) ** 0.5


def moved(x, t, s, mean=MEAN):
    """The exact flow from time t to time s."""
    return (1 - s) * mean + deviation(s) / deviation(t) * (x - (1 - t) * mean)


def mean_velocity(t, x, until=None, mean=MEAN):
    """The average velocity over [until, t], and the velocity without `until`."""
    if until is None:
        slope = ((1 - t) * -(SPREAD**2) + t) / deviation(t) ** 2
        return slope * (x - (1 - t) * mean) - mean
    return (x - moved(x, t, until, mean)) / (t - until)


def network(t, x, condition, until=None):
    """The null label's data have the mean 0, the others' their label."""
    spread = (-1, 1, 1, 1)
    means = torch.where(condition.labels == NULL, 0, condition.labels).double().view(spread)
    return mean_velocity(t.view(spread), x, None if until is None else until.view(spread), means)


def guided(inner=network, **options):
    labels = torch.arange(3)
    return GuidedVelocity(inner, Labels(labels), Labels(torch.full((3,), NULL)), GuidanceOptions(**options))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_gaussian_data_are_exact_in_any_number_of_steps(steps, shift, grid):
    solution = solve(mean_velocity, NOISE, SolverOptions("flow_map", steps, time_grid=grid, time_shift=shift))
    torch.testing.assert_close(solution.x, moved(NOISE, 1.0, 0.0), rtol=0, atol=1e-13)
    assert solution.evaluations.tolist() == [steps] * 3


def test_other_solvers_integrate_the_same_flow():
    found = solve(guided(), NOISE, SolverOptions("rk4", 40)).x
    averages = solve(guided(), NOISE, SolverOptions("flow_map", 1)).x
    torch.testing.assert_close(found, averages, rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_fresh_noise_preserves_the_marginals(share, shift):
    """The sample is affine in the noises. Sample 0 has none, so its value is the mean; sample i has a 1 in noise i."""
    steps = 4
    start = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
    start[1] = 1

    def draw(step):
        noise = torch.zeros_like(start)
        noise[step + 2] = 1
        return noise

    options = SolverOptions("flow_map", steps, reinject_noise=share, time_shift=shift)
    x = solve(mean_velocity, start, options, draw=draw).x.flatten()
    assert x[0].item() == pytest.approx(MEAN, abs=1e-13)
    parts = (x[1:] - x[0]).square()
    assert parts.sum().item() == pytest.approx(SPREAD**2, abs=1e-13)
    assert parts[1:].min() > 1e-4


def test_all_noise_fresh_is_multistep_consistency_sampling():
    draws = torch.randn(2, *NOISE.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = SolverOptions("flow_map", 3, reinject_noise=1.0)

    def crude(t, x, until):
        return torch.sin(x + t) + until

    x = NOISE
    for number, (t, s) in enumerate(pairwise(time_grid(options))):
        data = x - t * torch.sin(x + t)
        x = data if s == 0 else (1 - s) * data + s * draws[number]
    solution = solve(crude, NOISE, options, draw=draws.__getitem__)
    torch.testing.assert_close(solution.x, x, rtol=0, atol=1e-13)
    assert solution.evaluations.tolist() == [3] * 3


@pytest.mark.parametrize("steps", [1, 3])
def test_guidance_extrapolates_average_velocities(steps):
    """All classes have the same spread, so guidance moves the mean by the scale."""
    velocity = guided(cfg_scale=2.5)
    solution = solve(velocity, NOISE, SolverOptions("flow_map", steps))
    expected = torch.stack([moved(x, 1.0, 0.0, 2.5 * label) for label, x in enumerate(NOISE)])
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=1e-12)
    assert velocity.evaluations(3).tolist() == [2 * steps] * 3
    assert solution.evaluations.tolist() == [steps] * 3


def test_guidance_within_an_interval_acts_on_whole_steps():
    calls = []

    def recorded(t, x, condition, until):
        calls.append((round(t[0].item(), 9), round(until[0].item(), 9), len(x)))
        return network(t, x, condition, until)

    solve(guided(recorded, cfg_scale=2.0, cfg_interval=(0.2, 0.7)), NOISE, SolverOptions("flow_map", 4))
    assert calls == [(1, 0.7, 3), (0.7, 0.45, 6), (0.45, 0.2, 6), (0.2, 0, 3)]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_embedded_guidance_is_an_input_of_all_but_the_null_class(scale):
    calls = []

    def recorded(t, x, condition, **others):
        calls.append({name: value.tolist() for name, value in others.items()})
        return network(t, x, condition, others.get("until"))

    t = torch.tensor(0.5, dtype=torch.float64)
    velocity = guided(recorded, embedded_guidance=4.0, cfg_scale=scale)
    velocity(t, NOISE)
    velocity(t, NOISE, until=t / 2)
    nulls = [1.0] * 3 if scale != 1 else []
    both = 3 + len(nulls)
    assert calls == [{"guidance": [4.0] * 3 + nulls}, {"guidance": [4.0] * 3 + nulls, "until": [0.25] * both}]


def test_selected_rows_of_some_guided_samples():
    """Samples whose times differ may be guided or not; all get their own `until`."""
    t, until = torch.tensor([0.9, 0.5, 0.3]).double(), torch.tensor([0.2, 0.1, 0.0]).double()
    found = guided(cfg_scale=2.0, cfg_interval=(0.4, 0.6))(t, NOISE, until=until)
    plain, full = (guided(cfg_scale=scale)(t, NOISE, until=until) for scale in (1.0, 2.0))
    torch.testing.assert_close(found, torch.stack([plain[0], full[1], plain[2]]))


def test_a_network_that_predicts_data_gives_average_velocities_by_the_same_map():
    options = FlowMatchingOptions(prediction="data")
    read = FlowMatching(options, options).velocity
    own = VelocityNetwork(lambda t, x, condition, until: x * until.view(-1, 1, 1, 1), read)
    t, until = torch.full((3,), 0.5).double(), torch.tensor([0.1, 0.2, 0.3]).double()
    expected = (NOISE - NOISE * until.view(-1, 1, 1, 1)) / 0.5
    torch.testing.assert_close(own(t, NOISE, None, until=until), expected, rtol=0, atol=1e-3)  # sigma_min is 1e-5


def test_noise_is_asked_for_once_per_step_but_the_last():
    asked = []
    options = SolverOptions("flow_map", 4, reinject_noise=0.5)
    solve(guided(cfg_scale=2.0, cfg_interval=(0.2, 0.7)), NOISE, options, draw=lambda n: asked.append(n) or 0 * NOISE)
    assert asked == [0, 1, 2]
    with pytest.raises(ValueError, match="this method adds noise: pass"):
        solve(mean_velocity, NOISE, options)


def test_what_the_solver_cannot_do_is_refused():
    with pytest.raises(UsageError, match="--reinject_noise requires --method flow_map, but --method dpm was given"):
        check_method(SolverOptions("dpm", reinject_noise=0.5))
    with pytest.raises(UsageError, match="--method flow_map cannot integrate from data to noise: choose one of euler"):
        check_method(SolverOptions("flow_map"), backwards=True)
    with pytest.raises(UsageError, match="--method flow_map needs --num_steps of at least 1"):
        check_method(SolverOptions("flow_map", 0))


def test_settings_of_older_samples_are_unchanged():
    for options, name in ((SolverOptions(), "reinject_noise"), (GuidanceOptions(), "embedded_guidance")):
        assert name not in as_json(options)
        assert name not in repr(options)
    assert as_json(SolverOptions("flow_map", reinject_noise=0.5))["reinject_noise"] == 0.5
    assert "embedded_guidance=3.0" in repr(GuidanceOptions(embedded_guidance=3.0))
