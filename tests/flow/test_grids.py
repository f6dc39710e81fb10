import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from flow.grids import GRIDS, time_grid
from flow.ode import SolverOptions
from flow.solvers import solve
from options import UsageError, as_json, make_options


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("shift", [0.4, 1.0, 3.0])
def test_every_grid_decreases_from_one_to_zero(name, steps, shift):
    times = time_grid(SolverOptions("euler", steps, time_grid=name, time_shift=shift))
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, steps + 1)
    assert all(later < earlier for earlier, later in pairwise(times))


def test_values_of_the_grids():
    assert time_grid(SolverOptions("euler", 4)) == [1, 0.75, 0.5, 0.25, 0]
    assert time_grid(SolverOptions("euler", 4, time_grid="quadratic")) == [1, 0.5625, 0.25, 0.0625, 0]
    quantiles = [NormalDist(0.3, 0.8).inv_cdf(u) for u in (0.75, 0.5, 0.25)]
    logit = time_grid(SolverOptions("euler", 4, time_grid="logit_normal", grid_location=0.3, grid_scale=0.8))
    assert logit[1:-1] == pytest.approx([1 / (1 + math.exp(-value)) for value in quantiles])
    assert time_grid(SolverOptions("euler", 2, time_shift=3.0)) == [1, 0.75, 0]


def test_edm_grid_has_the_noise_levels_of_edm():
    """sigma_i = (80^(1/7) + i / (N - 1) (0.002^(1/7) - 80^(1/7)))^7 for i = 0..N-1, except for the first one."""
    times = torch.tensor(time_grid(SolverOptions("heun", 18, time_grid="edm")), dtype=torch.float64)
    sigma = times[1:-1] / (1 - times[1:-1])
    assert sigma[0].item() == pytest.approx(57.58, abs=0.01)
    assert sigma[-1].item() == pytest.approx(0.002)
    torch.testing.assert_close((sigma ** (1 / 7)).diff().diff(), torch.zeros(15).double(), rtol=0, atol=1e-12)


def test_a_grid_whose_times_coincide_is_refused():
    with pytest.raises(UsageError, match="--time_grid logit_normal has coinciding times at 20 steps"):
        time_grid(SolverOptions("euler", 20, time_grid="logit_normal", grid_scale=60.0))


def test_no_steps_are_refused():
    with pytest.raises(UsageError, match="--method euler needs --num_steps of at least 1, but 0 was given"):
        time_grid(SolverOptions("euler", 0))


def test_the_automatic_shift_follows_the_latents():
    auto = make_options(SolverOptions, {"method": "euler", "num_steps": 4, "time_shift": "auto"})
    assert time_grid(auto, dimensions=16 * 32**2) == time_grid(SolverOptions("euler", 4, time_shift=2.0))
    assert time_grid(auto, dimensions=256) == time_grid(auto) == time_grid(SolverOptions("euler", 4))
    seen = []
    solve(lambda t, x: seen.append(t.item()) or 0 * x, torch.zeros(1, 16, 32, 32), auto)
    assert seen == pytest.approx(time_grid(SolverOptions("euler", 4, time_shift=2.0))[:-1])


def test_a_last_step_of_its_own_length_and_an_end_before_data():
    assert time_grid(SolverOptions("euler", 4, last_step=0.1)) == pytest.approx([1, 0.7, 0.4, 0.1, 0])
    assert time_grid(SolverOptions("euler", 3, end_time=0.1)) == pytest.approx([1, 0.7, 0.4, 0.1])
    assert time_grid(SolverOptions("euler", 3, last_step=0.3, end_time=0.1)) == pytest.approx([1, 0.7, 0.4, 0.1])
    assert time_grid(SolverOptions("euler", 1, last_step=0.1)) == [1, 0]
    shifted = time_grid(SolverOptions("euler", 3, end_time=0.1, time_shift=2.0))
    assert shifted[-1] == pytest.approx(0.2 / 1.1)
    reached = time_grid(SolverOptions("euler", 3, end_time=0.1), breakpoints=(0.5, 0.05))
    assert (reached[0], reached[2], reached[-1]) == (1, 0.5, pytest.approx(0.1))


def test_a_grid_that_is_left_as_it_is():
    free = SolverOptions("euler", 4, fit_grid=False)
    assert time_grid(free, breakpoints=(0.7, 0.3)) == time_grid(SolverOptions("euler", 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"time_grid": "edm", "end_time": 0.1},
            "--last_step and --end_time need --time_grid uniform, but edm was given",
        ),
        ({"end_time": 0.7, "last_step": 0.4}, "--last_step 0.4 and --end_time 0.7: expected a sum below 1"),
    ],
)
def test_ends_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        time_grid(SolverOptions("euler", 4, **options))


def test_integration_from_data_starts_at_data():
    with pytest.raises(UsageError, match="--end_time 0.001: integrating from data to noise starts at 0"):
        solve(lambda t, x: x, torch.zeros(1, 1, 1, 1), SolverOptions("euler", 4, end_time=0.001), backwards=True)


def test_settings_without_the_newer_options_are_those_of_older_samples():
    newer = {"last_step": 0.04, "end_time": 0.001, "fit_grid": False}
    assert not newer.keys() & as_json(SolverOptions()).keys()
    assert newer.items() <= as_json(SolverOptions(**newer)).items()
