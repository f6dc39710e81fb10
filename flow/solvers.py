"""Solvers of dx/dt = velocity(t, x) from t = 1 (noise) to t = 0 (data), by name in SOLVERS."""

from functools import partial
from typing import NamedTuple

import torch

from flow.adaptive import dopri5
from flow.grids import time_grid
from flow.multistep import adams_bashforth, dpm_solver
from flow.ode import Draw, Solution, Solver, SolverOptions, Velocity
from flow.runge_kutta import TABLEAUS, runge_kutta
from flow.stochastic import heun, reverse_sde
from flow.torchdiffeq_methods import torchdiffeq_solver
from options import UsageError

__all__ = ["SOLVERS", "Method", "Solution", "SolverOptions", "Velocity", "check_method", "needs_float32", "solve"]


class Method(NamedTuple):
    """A solver, whether its steps are adaptive, and whether it can also integrate from data to noise."""

    run: Solver
    adaptive: bool = False
    reversible: bool = True


SOLVERS: dict[str, Method] = {
    **{name: Method(partial(runge_kutta, tableau)) for name, tableau in TABLEAUS.items()},
    "heun": Method(heun),
    "ab2": Method(partial(adams_bashforth, 2)),
    "ab3": Method(partial(adams_bashforth, 3)),
    "ab4": Method(partial(adams_bashforth, 4)),
    "multistep": Method(partial(adams_bashforth, 2)),  # LFM's name for ab2
    "dpm": Method(dpm_solver, reversible=False),
    "stochastic": Method(reverse_sde, reversible=False),
    "dopri5": Method(dopri5, adaptive=True),
    "torchdiffeq_dopri5": Method(partial(torchdiffeq_solver, "dopri5"), adaptive=True),
    **{name: Method(partial(torchdiffeq_solver, name), adaptive=True) for name in ("dopri8", "adaptive_heun", "bosh3")},
}


MIN_BF16_TOLERANCE = 1e-3


def needs_float32(options: SolverOptions) -> bool:
    """Whether the solver is adaptive, with tolerances so tight that it would mistake bfloat16 rounding for integration error.

    In bfloat16, it would then take more and smaller steps.
    """
    return SOLVERS[options.method].adaptive and min(options.atol, options.rtol) < MIN_BF16_TOLERANCE


def check_method(options: SolverOptions, backwards: bool = False) -> None:
    """Check that the method exists and supports the other options.

    Raises:
        UsageError: an unknown method (the message lists the known ones), churn without heun, an invalid time grid (see
            `time_grid`), or, if `backwards`, a method that cannot integrate from data to noise.
    """
    if options.method not in SOLVERS:
        raise UsageError(f"unknown --method {options.method!r}: expected one of {', '.join(SOLVERS)}")
    if options.churn and options.method != "heun":
        raise UsageError(f"--churn requires --method heun, but --method {options.method} was given")
    if backwards and (options.churn or not SOLVERS[options.method].reversible):
        usable = ", ".join(name for name, method in SOLVERS.items() if method.reversible)
        name = "heun with churn" if options.churn else options.method
        raise UsageError(f"--method {name} cannot integrate from data to noise: choose one of {usable}")
    if not SOLVERS[options.method].adaptive:
        time_grid(options)  # raises UsageError for an invalid grid


def _missing_draw(step: int) -> torch.Tensor:
    raise ValueError("this method adds noise: pass solve(..., draw=...), a function that maps a step to noise like x")


@torch.no_grad()
def solve(
    velocity: Velocity, x: torch.Tensor, options: SolverOptions, *, draw: Draw = _missing_draw, backwards: bool = False
) -> Solution:
    """Integrate from noise x [B, C, h, w] at t = 1 to data at t = 0.

    Args:
        velocity: velocity(t, x), where t is [] or [B].
        x: the initial state.
        options: method, steps and tolerances.
        draw: draw(step) is standard normal noise like x; `stochastic` and churn need it.
        backwards: integrate from data at t = 0 to noise at t = 1 instead, on the same grid.

    Raises:
        UsageError: see `check_method` and `time_grid`.
    """
    check_method(options, backwards)
    method = SOLVERS[options.method]
    times = [1.0, 0.0] if method.adaptive else time_grid(options)
    return method.run(velocity, x, times[::-1] if backwards else times, options, draw)
