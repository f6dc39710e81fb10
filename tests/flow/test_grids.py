import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from flow.grids import GRIDS, time_grid
from flow.ode import SolverOptions
from flow.solvers import solve
from options import UsageError, make_options


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
