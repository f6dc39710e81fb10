"""Exact log-likelihood by the instantaneous change of variables (Chen et al. 2018, arXiv:1806.07366, theorem 1).

Along dx/dt = v(t, x), the density obeys d log p_t(x_t) / dt = -div v. Integrating from data (t = 0) to noise (t = 1) gives

    log p_0(x_0) = log N(x_1; 0, I) + integral of div v over t from 0 to 1.
"""

import math
from typing import NamedTuple

import torch

from flow.ode import SolverOptions, Velocity, select_rows
from flow.solvers import solve

__all__ = ["Likelihood", "log_likelihood"]


class Likelihood(NamedTuple):
    """Log-density in nats [B], the noise [B, C, h, w] at the end of the trajectory, and velocity evaluations [B]."""

    log_density: torch.Tensor
    noise: torch.Tensor
    evaluations: torch.Tensor

    @property
    def bits_per_dimension(self) -> torch.Tensor:
        """-log2 of the density per dimension, [B]. Lower is more likely; negative where the density exceeds 1."""
        return -self.log_density / (self.noise[0].numel() * math.log(2))


def log_likelihood(
    velocity: Velocity, data: torch.Tensor, options: SolverOptions, probe: torch.Tensor | None = None
) -> Likelihood:
    """Log-likelihood of `data` [B, C, h, w] under the flow.

    Args:
        velocity: differentiable in x; must treat samples independently.
        data: points at t = 0.
        options: the solver; its tolerances apply to the integrated divergence as well as to x.
        probe: random signs or standard normal numbers like `data`, for Hutchinson's unbiased estimate of the divergence
            (Grathwohl et al. 2019, arXiv:1810.01367, section 3.1). It takes one backward pass per evaluation, and the same
            probe is used along the whole trajectory. None: the exact trace, with one backward pass per dimension.

    Raises:
        UsageError: the solver cannot integrate from data to noise.
    """
    joint = _WithDivergence(velocity, data.shape[1:], probe)
    start = torch.cat([data.flatten(1), data.new_zeros(len(data), 1)], dim=1)
    solution = solve(joint, start, options, backwards=True)
    noise, integral = solution.x[:, :-1], solution.x[:, -1]
    normal = -0.5 * (noise.square().sum(1) + noise.shape[1] * math.log(2 * math.pi))
    return Likelihood(normal + integral, noise.view_as(data), solution.evaluations)


class _WithDivergence:
    """The joint velocity of x and the accumulated divergence, which form one state [B, D + 1]."""

    def __init__(self, velocity: Velocity, shape: torch.Size, probe: torch.Tensor | None) -> None:
        self._velocity = velocity
        self._shape = shape
        self._probe = probe

    def __call__(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = state[:, :-1].reshape(-1, *self._shape).detach().requires_grad_()
            v = self._velocity(t, x)
            divergence = _exact_trace(v, x) if self._probe is None else _hutchinson(v, x, self._probe)
        return torch.cat([v.detach().flatten(1), divergence[:, None]], dim=1)

    def select_rows(self, rows: torch.Tensor) -> "_WithDivergence":
        probe = None if self._probe is None else self._probe[rows]
        return _WithDivergence(select_rows(self._velocity, rows), self._shape, probe)


def _hutchinson(v: torch.Tensor, x: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
    (product,) = torch.autograd.grad(v, x, probe)
    return (product * probe).flatten(1).sum(1)


def _exact_trace(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The divergence, sum over dimensions d of dv_d / dx_d.

    Samples are independent, so one backward pass per dimension covers the whole batch.
    """
    outputs = v.flatten(1).sum(0)
    trace = x.new_zeros(len(x))
    for dimension in range(len(outputs)):
        (row,) = torch.autograd.grad(outputs[dimension], x, retain_graph=dimension < len(outputs) - 1)
        trace = trace + row.flatten(1)[:, dimension]
    return trace
