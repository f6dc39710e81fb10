"""Mean and variance of stochastic solvers on Gaussian data, computed without random numbers.

For data N(m, s^2), the exact velocity is linear in x, so a sample is linear in its initial noise and in every later draw.
Its variance is the sum of the squared coefficients, which a batch of unit vectors reveals.
"""

import math

import numpy as np
import pytest
import torch

from flow.diffusions import DIFFUSIONS
from flow.solvers import SolverOptions, adds_noise, solve
from flow.stochastic import _noise_decay
from options import UsageError

MEAN, SPREAD = 0.7, 0.4


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


def test_the_direction_of_time_agrees_with_sit():
    """SiT's published `decreasing` is 0.0006 at t = 0.1 and 0.9517 at t = 0.9, near noise; its `linear` is the noise level."""
    values = {name: weight(np.array([0.1, 0.9])) for name, weight in DIFFUSIONS.items()}
    assert values["decreasing"] == pytest.approx([0.000599, 0.951655], abs=1e-6)
    assert values["linear"] == pytest.approx([0.1, 0.9])
    assert values["sigma"] == pytest.approx([0.1, 0.9])
    assert values["kl"] == pytest.approx([2 / 9, 18])
    assert values["constant"] == pytest.approx([1, 1])
    assert values["increasing_decreasing"] == pytest.approx([0.095492, 0.095492], abs=1e-6)


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_the_sdes_mean_and_variance_converge_to_the_datas(diffusion):
    """The weak order is 1 for `constant`. For the others it is 2, up to a logarithm that lowers it to 1.6 at these steps."""
    (mean, coarse), (_, fine) = (moments(steps, method="stochastic", diffusion=diffusion) for steps in (256, 512))
    assert mean == pytest.approx(MEAN, abs=1e-12)
    errors = [abs(variance - SPREAD**2) for variance in (coarse, fine)]
    assert errors[1] < (1e-3 if diffusion == "constant" else 4e-5)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(0.95 if diffusion == "constant" else 1.7, abs=0.2)


@pytest.mark.parametrize("diffusion", ["sigma", "linear", "decreasing", "increasing_decreasing"])
@pytest.mark.parametrize("steps", [16, 32, 64])
def test_coarse_steps_are_less_biased_than_those_of_euler_and_maruyama(diffusion, steps):
    """The Euler-Maruyama method for the same SDE, with the mean as its last step, as in SiT."""
    response = torch.zeros(steps, dtype=torch.float64)  # of x to the initial noise and each step's noise
    response[0] = 1
    for step in range(steps - 1):
        t, h = 1 - step / steps, 1 / steps
        weight, zero = DIFFUSIONS[diffusion](np.array(t)).item(), gaussian_velocity(t, 0.0)
        v = gaussian_velocity(t, response) - zero
        response = response - h * (v + weight / 2 * (response + (1 - t) * v) / t)
        response[step + 1] += math.sqrt(weight * h)
    t = 1 / steps
    response = response - t * (gaussian_velocity(t, response) - gaussian_velocity(t, 0.0))
    theirs = abs(response.square().sum().item() - SPREAD**2)
    ours = abs(moments(steps, method="stochastic", diffusion=diffusion)[1] - SPREAD**2)
    assert ours < 0.7 * theirs


@pytest.mark.parametrize("diffusion", sorted(DIFFUSIONS.keys() - {"kl", "constant"}))
def test_euler_and_maruyamas_method_has_weak_order_one(diffusion):
    """`kl` is infinite at t = 1, and the score's factor 1 / t makes `constant` stiff near data."""
    options = {"method": "euler_maruyama", "diffusion": diffusion, "last_step": 0.001}
    (mean, coarse), (_, fine) = (moments(steps, **options) for steps in (500, 1000))
    assert mean == pytest.approx(MEAN, abs=5e-3)
    errors = [abs(variance - SPREAD**2) for variance in (coarse, fine)]
    assert errors[1] < 3e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.3)


def test_euler_and_maruyamas_method_adds_noise_to_every_step_but_that_to_data():
    def asked(**options):
        steps = []
        noise = torch.zeros(1, 1, 1, 1)
        options = SolverOptions("euler_maruyama", 4, **options)
        solve(gaussian_velocity, noise, options, draw=lambda step: steps.append(step) or noise)
        return steps

    assert asked() == [0, 1, 2]
    assert asked(end_time=0.1) == [0, 1, 2, 3]


def test_without_diffusion_euler_and_maruyamas_method_is_eulers():
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still = SolverOptions("euler_maruyama", 10, diffusion_norm=0.0)
    found = solve(gaussian_velocity, noise, still, draw=lambda step: torch.full_like(noise, 1e6)).x
    torch.testing.assert_close(found, solve(gaussian_velocity, noise, SolverOptions("euler", 10)).x)


def test_without_diffusion_the_sde_is_an_ode():
    """Its first step is Euler's. Its order is 2, up to a logarithm that lowers it to 1.5 at these steps."""
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def sample(steps):
        still = SolverOptions("stochastic", steps, diffusion_norm=0.0)
        return solve(gaussian_velocity, noise, still, draw=lambda step: torch.full_like(noise, 1e6)).x

    torch.testing.assert_close(sample(1), solve(gaussian_velocity, noise, SolverOptions("euler", 1)).x)
    coarse, fine = ((sample(steps) - (MEAN + SPREAD * noise)).abs().max().item() for steps in (256, 512))
    assert math.log2(coarse / fine) == pytest.approx(1.55, abs=0.1)
    euler = solve(gaussian_velocity, noise, SolverOptions("euler", 512)).x
    assert fine < 0.05 * (euler - (MEAN + SPREAD * noise)).abs().max()


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
        ({"method": "euler_maruyama"}, "--method euler_maruyama cannot integrate from data to noise"),
        ({"method": "dpm"}, "--method dpm cannot integrate from data to noise"),
        ({"method": "heun", "churn": 1.0}, "--method heun with churn cannot integrate from data to noise"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        solve(gaussian_velocity, torch.zeros(1, 1, 1, 1), SolverOptions(**options), backwards=True)


def test_an_infinite_diffusion_is_refused():
    with pytest.raises(UsageError, match="--diffusion kl is infinite at t = 1, where --method euler_maruyama starts"):
        solve(gaussian_velocity, torch.zeros(1, 1, 1, 1), SolverOptions("euler_maruyama", diffusion="kl"))


@pytest.mark.parametrize("method", ["stochastic", "euler_maruyama"])
def test_noise_must_be_given(method):
    assert adds_noise(SolverOptions(method))
    with pytest.raises(ValueError, match="adds noise: pass solve"):
        solve(gaussian_velocity, torch.zeros(1, 1, 1, 1), SolverOptions(method, 2))
