"""Solvers of dx/dt = velocity(t, x) from t = 1 (noise) to t = 0 (data), by name in SOLVERS."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from flow.adaptive import dopri5
from flow.few_steps import flow_map
from flow.grids import time_grid
from flow.multistep import adams_bashforth, dpm_solver
from flow.ode import (
    FLOAT32_EPS,
    Draw,
    Solution,
    Solver,
    SolverOptions,
    Velocity,
    are_unreachable,
    breakpoints_of,
    restrict,
)
from flow.runge_kutta import TABLEAUS, runge_kutta
from flow.stochastic import check_diffusion, euler_maruyama, heun, reverse_sde
from flow.torchdiffeq_methods import torchdiffeq_solver
from options import UsageError

__all__ = [
    "SOLVERS",
    "Method",
    "Solution",
    "SolverOptions",
    "Velocity",
    "adds_noise",
    "check_method",
    "needs_float32",
    "solve",
    "unreachable_tolerances",
]


class Method(NamedTuple):
    """A solver.

    Args:
        run: the solver.
        adaptive: whether its steps are adaptive.
        reversible: whether it can also integrate from data to noise.
        averages: whether it needs average velocities over its steps, which only flow maps predict.
        stochastic: whether it always adds noise.
    """

    run: Solver
    adaptive: bool = False
    reversible: bool = True
    averages: bool = False
    stochastic: bool = False


SOLVERS: dict[str, Method] = {
    **{name: Method(partial(runge_kutta, tableau)) for name, tableau in TABLEAUS.items()},
    "heun": Method(heun),
    "ab2": Method(partial(adams_bashforth, 2)),
    "ab3": Method(partial(adams_bashforth, 3)),
    "ab4": Method(partial(adams_bashforth, 4)),
    "multistep": Method(partial(adams_bashforth, 2)),  # LFM's name for ab2
    "dpm": Method(dpm_solver, reversible=False),
    "stochastic": Method(reverse_sde, reversible=False, stochastic=True),
    "euler_maruyama": Method(euler_maruyama, reversible=False, stochastic=True),
    "flow_map": Method(flow_map, reversible=False, averages=True),
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


def unreachable_tolerances(options: SolverOptions, precision: str) -> str:
    """A note about tolerances that are below what `precision`, a key of PRECISIONS, can resolve; "" if they are not."""
    if not SOLVERS[options.method].adaptive:
        return ""
    tolerances = f"--atol {options.atol:g} and --rtol {options.rtol:g}"
    if are_unreachable(options):
        return (
            f"{tolerances} are below what float32 resolves, about {FLOAT32_EPS:.1g} of a value of 1: --method {options.method} "
            "will take many thousands of evaluations without a better result; choose 1e-6 or more"
        )
    if needs_float32(options) and precision != "fp32":
        return (
            f"{tolerances} are below what --precision {precision} resolves: --method {options.method} will take more "
            f"evaluations than in fp32; choose {MIN_BF16_TOLERANCE:g} or more, or leave --precision out"
        )
    return ""


def check_method(options: SolverOptions, backwards: bool = False) -> None:
    """Check that the method exists and supports the other options.

    Raises:
        UsageError: an unknown method (the message lists the known ones), an option of another method, an invalid time grid (see
            `time_grid`) or diffusion, or, if `backwards`, a method that cannot integrate from data to noise.
    """
    if options.method not in SOLVERS:
        raise UsageError(f"unknown --method {options.method!r}: expected one of {', '.join(SOLVERS)}")
    for name, method in {"churn": "heun", "reinject_noise": "flow_map"}.items():
        if getattr(options, name) and options.method != method:
            raise UsageError(f"--{name} requires --method {method}, but --method {options.method} was given")
    if backwards and (options.churn or not SOLVERS[options.method].reversible):
        usable = ", ".join(name for name, method in SOLVERS.items() if method.reversible)
        name = "heun with churn" if options.churn else options.method
        raise UsageError(f"--method {name} cannot integrate from data to noise: choose one of {usable}")
    if backwards and options.end_time:
        raise UsageError(
            f"--end_time {options.end_time:g}: integrating from data to noise starts at 0, so leave it out"
        )
    if options.method == "euler_maruyama":
        check_diffusion(options)
    if not SOLVERS[options.method].adaptive:
        time_grid(options)  # raises UsageError for an invalid grid


def adds_noise(options: SolverOptions) -> bool:
    """Whether the solver adds noise on the way, so that its samples depend on more than the initial state."""
    return SOLVERS[options.method].stochastic or options.churn > 0 or options.reinject_noise > 0


def _missing_draw(step: int) -> torch.Tensor:
    raise ValueError("this method adds noise: pass solve(..., draw=...), a function that maps a step to noise like x")


@torch.no_grad()
def solve(
    velocity: Velocity, x: torch.Tensor, options: SolverOptions, *, draw: Draw = _missing_draw, backwards: bool = False
) -> Solution:
    """Integrate from noise x [B, C, h, w] at t = 1 to data at t = 0.

    A velocity that jumps, such as one with a guidance interval, is integrated piece by piece: no step crosses a breakpoint,
    and adaptive step sizes and the history of multistep methods start afresh there. Fixed-step grids reach the breakpoints
    (see `time_grid`). If there are too few steps for that, the solver starts afresh at every step. Without `fit_grid`, a
    fixed-step solver ignores breakpoints.

    Args:
        velocity: velocity(t, x), where t is [] or [B]; `flow_map` calls velocity(t, x, until=s).
        x: the initial state.
        options: method, steps and tolerances.
        draw: draw(step) is standard normal noise like x; `stochastic`, churn and noise re-injection need it.
        backwards: integrate from data at t = 0 to noise at t = 1 instead, on the same grid.

    Raises:
        UsageError: see `check_method` and `time_grid`.
    """
    check_method(options, backwards)
    method = SOLVERS[options.method]
    fits = method.adaptive or options.fit_grid
    breakpoints = breakpoints_of(velocity) if fits else []
    times = [1.0, *breakpoints, 0.0] if method.adaptive else time_grid(options, breakpoints, x[0].numel())
    inside = [time for time in breakpoints if time > times[-1]]  # --end_time may end the grid before a breakpoint
    evaluations, taken = torch.zeros(len(x), dtype=torch.long, device=x.device), 0
    for piece in _split(times[::-1] if backwards else times, inside):
        part = restrict(velocity, piece[0], piece[-1]) if fits else velocity
        x, used = method.run(part, x, piece, options, partial(_draw_later, draw, taken))
        evaluations, taken = evaluations + used, taken + len(piece) - 1
    return Solution(x, evaluations)


def _split(times: Sequence[float], breakpoints: Sequence[float]) -> list[Sequence[float]]:
    """Split times at the breakpoints, or at every time if they do not contain all breakpoints."""
    inner = range(1, len(times) - 1)
    at = [index for index in inner if times[index] in breakpoints]
    cuts = [0, *(at if len(at) == len(breakpoints) else inner), len(times) - 1]
    return [times[first : last + 1] for first, last in pairwise(cuts)]


def _draw_later(draw: Draw, taken: int, step: int) -> torch.Tensor:
    """The noise of a piece's step, after `taken` steps of earlier pieces."""
    return draw(taken + step)
