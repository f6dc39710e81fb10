"""Solvers of dx/dt = velocity(t, x) from t = 1 (noise) to t = 0 (data), by name in one dictionary."""

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
    """A solver, whether it chooses its steps itself, and whether it can also lead from data to noise."""

    run: Solver
    adaptive: bool = False
    reversible: bool = True


SOLVERS: dict[str, Method] = {
    **{name: Method(partial(runge_kutta, tableau)) for name, tableau in TABLEAUS.items()},
    "heun": Method(heun),
    "ab2": Method(partial(adams_bashforth, 2)),
    "ab3": Method(partial(adams_bashforth, 3)),
    "ab4": Method(partial(adams_bashforth, 4)),
    "multistep": Method(partial(adams_bashforth, 2)),  # the published name of ab2
    "dpm": Method(dpm_solver, reversible=False),
    "stochastic": Method(reverse_sde, reversible=False),
    "dopri5": Method(dopri5, adaptive=True),
    "torchdiffeq_dopri5": Method(partial(torchdiffeq_solver, "dopri5"), adaptive=True),
    **{name: Method(partial(torchdiffeq_solver, name), adaptive=True) for name in ("dopri8", "adaptive_heun", "bosh3")},
}


FINEST_IN_BF16 = 1e-3  # tolerance


def needs_float32(options: SolverOptions) -> bool:
    """Whether the solver would take bfloat16's rounding for its own error, and make more and smaller steps."""
    return SOLVERS[options.method].adaptive and min(options.atol, options.rtol) < FINEST_IN_BF16


def check_method(options: SolverOptions, backwards: bool = False) -> None:
    """Refuse a method that there is not, or that cannot do what is asked.

    Raises:
        UsageError: an unknown method (the message lists the known ones), churn without heun, a grid without intervals, or, if
            `backwards`, a method that does not lead from data to noise.
    """
    if options.method not in SOLVERS:
        raise UsageError(f"unknown --method {options.method!r}: expected one of {', '.join(SOLVERS)}")
    if options.churn and options.method != "heun":
        raise UsageError(f"--churn is for --method heun, but --method {options.method} was given")
    if backwards and (options.churn or not SOLVERS[options.method].reversible):
        usable = ", ".join(name for name, method in SOLVERS.items() if method.reversible)
        name = "heun with churn" if options.churn else options.method
        raise UsageError(f"--method {name} does not lead from data to noise: choose one of {usable}")
    if not SOLVERS[options.method].adaptive:
        time_grid(options)  # may refuse it


def _no_noise(step: int) -> torch.Tensor:
    raise ValueError("this method adds noise: pass solve(..., draw=...), a function of the step")


@torch.no_grad()
def solve(
    velocity: Velocity, x: torch.Tensor, options: SolverOptions, *, draw: Draw = _no_noise, backwards: bool = False
) -> Solution:
    """Integrate from noise x [B, C, h, w] at t = 1 to data at t = 0.

    Args:
        velocity: velocity(t, x), t being [] or [B].
        x: where to start.
        options: method, steps, tolerances.
        draw: standard normal noise like x for a step, for `stochastic` and churn.
        backwards: start from data at t = 0 and go to noise at t = 1, on the same grid.

    Raises:
        UsageError: see `check_method` and `time_grid`.
    """
    check_method(options, backwards)
    method = SOLVERS[options.method]
    times = [1.0, 0.0] if method.adaptive else time_grid(options)
    return method.run(velocity, x, times[::-1] if backwards else times, options, draw)
