"""Solvers of dx/dt = velocity(t, x) from t = 1 (noise) to t = 0 (data).

Explicit Runge-Kutta methods on a fixed grid are tableaus under one function; torchdiffeq brings the adaptive ones.
All stand in one dictionary and take (velocity, noise, options).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torchdiffeq

from flow.guidance import Velocity
from options import UsageError, option

__all__ = ["ADAPTIVE", "SOLVERS", "Solution", "SolverOptions", "check_method", "solve"]


@dataclass(frozen=True)
class SolverOptions:
    """Solver."""

    method: str = option("dopri5", "ODE solver: euler, midpoint, heun, rk4, dopri5, dopri8, adaptive_heun, bosh3")
    num_steps: int = option(40, "intervals of the fixed-step solvers (euler, midpoint, heun, rk4)", minimum=0)
    step_size: float | None = option(
        None, "fixed-step solvers: length h of an interval, meaning 1/h of them", minimum=1e-6
    )
    time_shift: float = option(
        1.0, "fixed-step solvers: grid t' = s t / (1 + (s - 1) t); below 1, shorter steps near data", minimum=1e-6
    )
    atol: float = option(1e-5, "absolute tolerance of the adaptive solvers", minimum=0)
    rtol: float = option(1e-5, "relative tolerance of the adaptive solvers", minimum=0)


class Solution(NamedTuple):
    """The sample x at t = 0, [B, C, h, w], and the number of velocity evaluations that each sample took."""

    x: torch.Tensor
    evaluations: int


class Tableau(NamedTuple):
    """Butcher tableau of an explicit method: stage times, stage weights row by row, final weights."""

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


# heun is the trapezoidal rule of EDM's deterministic sampler (Karras et al. 2022, algorithm 1);
# rk4 is torchdiffeq's, the 3/8 rule.
TABLEAUS = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": Tableau((0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
ADAPTIVE = ("dopri5", "dopri8", "adaptive_heun", "bosh3")


def time_grid(options: SolverOptions) -> torch.Tensor:
    """Times [num_steps + 1] from 1 down to 0, float64, shifted by `time_shift` (Esser et al. 2024, section 5.3.2)."""
    steps = options.num_steps if options.step_size is None else max(1, round(1 / options.step_size))
    if steps < 1:
        raise UsageError(f"--method {options.method} needs --num_steps of at least 1, but {steps} was given")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return options.time_shift * t / (1 - t + options.time_shift * t)  # exactly 1 and 0 at the ends


def check_method(options: SolverOptions) -> None:
    """Refuse a method that there is not.

    Raises:
        UsageError: an unknown method; the message lists the known ones.
    """
    if options.method not in SOLVERS:
        raise UsageError(f"unknown --method {options.method!r}: expected one of {', '.join(SOLVERS)}")


@torch.no_grad()
def solve(velocity: Velocity, noise: torch.Tensor, options: SolverOptions) -> Solution:
    """Integrate from noise [B, C, h, w] at t = 1 to t = 0.

    Raises:
        UsageError: an unknown method.
    """
    check_method(options)
    return SOLVERS[options.method](velocity, noise, options)


def runge_kutta(tableau: Tableau, velocity: Velocity, noise: torch.Tensor, options: SolverOptions) -> Solution:
    """Any explicit Runge-Kutta method on the time grid (Hairer, Norsett & Wanner 1993, section II.1)."""
    x, evaluations = noise, 0
    grid = time_grid(options).tolist()
    for start, end in pairwise(grid):
        step = end - start
        slopes: list[torch.Tensor] = []
        for node, row in zip(tableau.nodes, tableau.stages, strict=True):
            point = x + step * _combine(row, slopes) if any(row) else x
            slopes.append(velocity(torch.tensor(start + node * step, dtype=x.dtype, device=x.device), point))
        x = x + step * _combine(tableau.weights, slopes)
        evaluations += len(slopes)
    return Solution(x, evaluations)


def adaptive(method: str, velocity: Velocity, noise: torch.Tensor, options: SolverOptions) -> Solution:
    """torchdiffeq's adaptive methods; one step size for the whole batch, so samples depend on their batch mates."""
    counted = _Counter(velocity)
    ends = torch.tensor([1.0, 0.0], dtype=noise.dtype, device=noise.device)
    path = torchdiffeq.odeint(counted, noise, ends, method=method, atol=options.atol, rtol=options.rtol)
    return Solution(path[-1], counted.evaluations)


class _Counter:
    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.evaluations = 0

    def __call__(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.evaluations += 1
        return self.velocity(t, x)


def _combine(weights: tuple[float, ...], slopes: list[torch.Tensor]) -> torch.Tensor:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return sum(terms[1:], start=terms[0])


SOLVERS: dict[str, Callable[[Velocity, torch.Tensor, SolverOptions], Solution]] = {
    **{name: partial(runge_kutta, tableau) for name, tableau in TABLEAUS.items()},
    **{name: partial(adaptive, name) for name in ADAPTIVE},
}
