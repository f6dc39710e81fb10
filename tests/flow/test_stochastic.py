"""Mean and variance of stochastic solvers on Gaussian data, computed without random numbers.

For data N(m, s^2), the exact velocity is linear in x, so a sample is linear in its initial noise and in every later draw.
Its variance is the sum of the squared coefficients, which a batch of unit vectors reveals.
"""

import math

import numpy as np
import pytest
import torch

from flow.diffusions import DIFFUSIONS
from flow.solvers import SolverOptions, solve
from flow.stochastic import _noise_decay
from options import UsageError

MEAN, SPREAD = 0.7, 0.4
SETTLING = {"sigma": 1.0, "increasing_decreasing": 1.0, "kl": 0.9, "constant": 0.4, "linear": 0.4, "decreasing": 0.4}


def gaussian_velocity(t, x):
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (t - (1 - t) * SPREAD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def moments(steps, **options):
    """Mean and variance of the samples."""
    rows = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)  # rows: no noise, initial noise, each step's noise
    rows[1] = 1

    def draw(step):
        unit = torch.zeros_like(rows)
        unit[step + 2] = 1
        return unit

    x = solve(gaussian_velocity, rows, SolverOptions(num_steps=steps, **options), draw=draw).x.flatten()
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


def test_no_diffusion_is_negative():
    t = np.linspace(0, 0.999, 50)
    assert all((weight(t) >= 0).all() for weight in DIFFUSIONS.values())


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_the_sdes_mean_and_variance_converge_to_the_datas(diffusion):
    (mean, coarse), (_, fine) = (moments(steps, method="stochastic", diffusion=diffusion) for steps in (128, 256))
    assert mean == pytest.approx(MEAN, abs=1e-12)
    errors = [abs(variance - SPREAD**2) for variance in (coarse, fine)]
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(SETTLING[diffusion], abs=0.12)


def test_without_diffusion_the_sde_is_eulers_method():
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still = SolverOptions("stochastic", 7, diffusion_norm=0.0)
    x = solve(gaussian_velocity, noise, still, draw=lambda step: torch.full_like(noise, 1e6)).x
    torch.testing.assert_close(x, solve(gaussian_velocity, noise, SolverOptions("euler", 7)).x, rtol=0, atol=1e-12)


def test_the_fraction_of_noise_kept_by_a_step():
    """exp(-integral of c / (2 t)) = (end / start)^(c / 2) for w = c t, and exp(-c/2 (1/end - 1/start)) for w = c."""
    sigma = SolverOptions(diffusion="sigma", diffusion_norm=3.0)
    assert _noise_decay(sigma, 0.8, 0.5) == pytest.approx((0.5 / 0.8) ** 1.5, abs=1e-12)
    constant = SolverOptions(diffusion="constant", diffusion_norm=0.5)
    assert _noise_decay(constant, 0.8, 0.5) == pytest.approx(math.exp(-0.25 * (1 / 0.5 - 1 / 0.8)), abs=1e-12)
    assert _noise_decay(sigma, 0.1, 0.0) == 0


def test_a_long_step_of_strong_diffusion_stays_bounded():
    """The Euler-Maruyama method would multiply the remaining noise by about -3000."""
    mean, variance = moments(4, method="stochastic", diffusion="constant", diffusion_norm=1e3)
    assert mean == pytest.approx(MEAN)
    assert variance < SPREAD**2


def test_churn_preserves_mean_and_variance_and_replaces_noise():
    plain, churned = (
        [abs(moments(steps, method="heun", churn=churn)[1] - SPREAD**2) for steps in (32, 64)] for churn in (0.0, 4.0)
    )
    for coarse, fine in (plain, churned):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.35)
    assert churned != plain
    without = moments(16, method="heun", churn=4.0, churn_interval=(0.99, 1.0))
    assert without == moments(16, method="heun")
    louder = moments(16, method="heun", churn=4.0, churn_noise=1.2)[1]
    assert louder > moments(16, method="heun", churn=4.0)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "euler", "churn": 1.0}, "--churn requires --method heun, but --method euler was given"),
        ({"method": "stochastic"}, "--method stochastic cannot integrate from data to noise: choose one of euler"),
        ({"method": "dpm"}, "--method dpm cannot integrate from data to noise"),
        ({"method": "heun", "churn": 1.0}, "--method heun with churn cannot integrate from data to noise"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        solve(gaussian_velocity, torch.zeros(1, 1, 1, 1), SolverOptions(**options), backwards=True)


def test_noise_must_be_given():
    with pytest.raises(ValueError, match="adds noise: pass solve"):
        solve(gaussian_velocity, torch.zeros(1, 1, 1, 1), SolverOptions("stochastic", 2))
