"""Likelihoods compared with closed forms for Gaussian data N(mean, covariance) with a full covariance matrix."""

import math

import pytest
import torch

from flow.likelihood import log_likelihood
from flow.solvers import SolverOptions
from options import UsageError

SHAPE = (2, 2, 1)
GENERATOR = torch.Generator().manual_seed(0)
MEAN = torch.randn(4, generator=GENERATOR, dtype=torch.float64)
FACTOR = 0.5 * torch.randn(4, 4, generator=GENERATOR, dtype=torch.float64) + 0.5 * torch.eye(4, dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T
DATA = (MEAN + torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64) @ FACTOR.T).view(6, *SHAPE)
TIGHT = SolverOptions("dopri5", atol=1e-6, rtol=1e-6)


def velocity(t, x):
    """The velocity E[noise - data | x_t], where x_t is N((1 - t) mean, (1 - t)^2 covariance + t^2)."""
    t = t.expand(len(x)).view(-1, 1, 1)
    identity = torch.eye(4, dtype=x.dtype)
    inverse = torch.linalg.inv((1 - t) ** 2 * COVARIANCE + t**2 * identity)
    centered = (x.flatten(1) - (1 - t[:, 0]) * MEAN)[..., None]
    noise = t * inverse @ centered
    data = MEAN[:, None] + (1 - t) * COVARIANCE @ inverse @ centered
    return (noise - data)[..., 0].view_as(x)


def exact():
    return torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(DATA.flatten(1))


def test_exact_trace_gives_the_gaussian_density():
    likelihood = log_likelihood(velocity, DATA, TIGHT)
    torch.testing.assert_close(likelihood.log_density, exact(), rtol=0, atol=1e-4)
    torch.testing.assert_close(likelihood.bits_per_dimension, -exact() / (4 * math.log(2)), rtol=0, atol=1e-4)


def test_hutchinsons_estimate_averages_to_the_exact_trace():
    """The mean over all 16 sign vectors is the trace, because the probe is constant along the trajectory."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4).view(16, *SHAPE)
    estimates = [
        log_likelihood(velocity, DATA[row : row + 1].expand(16, *SHAPE), TIGHT, signs).log_density for row in range(2)
    ]
    for row, estimate in enumerate(estimates):
        assert estimate.std() > 1e-2
        torch.testing.assert_close(estimate.mean(), exact()[row], rtol=0, atol=1e-4)


def test_noise_is_the_datas_image_under_the_flow():
    """The flow of a Gaussian preserves the Mahalanobis distance."""
    noise = log_likelihood(velocity, DATA, TIGHT).noise.flatten(1)
    centered = DATA.flatten(1) - MEAN
    distance = (centered * torch.linalg.solve(COVARIANCE, centered.T).T).sum(1)
    torch.testing.assert_close(noise.square().sum(1), distance, rtol=0, atol=1e-4)


def test_fixed_step_solvers_converge_to_the_same_likelihood():
    errors = [
        (log_likelihood(velocity, DATA, SolverOptions("rk4", steps)).log_density - exact()).abs().max()
        for steps in (16, 32)
    ]
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] > 8


def test_solvers_without_reversal_are_refused():
    with pytest.raises(UsageError, match="--method dpm cannot integrate from data to noise"):
        log_likelihood(velocity, DATA, SolverOptions("dpm"))
