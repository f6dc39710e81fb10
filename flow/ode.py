"""Arguments and results of every solver of dx/dt = velocity(t, x), from t = 1 (noise) to t = 0 (data).

A velocity may have two methods and one attribute that solvers use, through the functions below: `select_rows`, `breakpoints`
and `restrict`. A velocity that wraps another one must pass them on. The velocity of a flow map is also called as velocity(t, x,
until=s) and then returns the average velocity over [s, t].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch

from flow.diffusions import DIFFUSIONS
from flow.grids import TimeGridOptions
from options import UsageError, option

__all__ = [
    "FLOAT32_EPS",
    "Draw",
    "Solution",
    "Solver",
    "SolverOptions",
    "Velocity",
    "are_unreachable",
    "breakpoints_of",
    "check_evaluations",
    "restrict",
    "select_rows",
    "solution_with_count",
    "time_tensor",
]

# velocity(t, x) or velocity(t, x, until=s): t and s are one time [] or one per sample [B]; x and the result are [B, C, h, w].
Velocity = Callable[..., torch.Tensor]
# Breakpoints closer than this to each other or to the ends are ignored. float32 can resolve this distance.
SHORTEST_PIECE = 1e-6
# Evaluations of a batch by an adaptive solver, between two breakpoints, after which it gives up. Tolerances near 1e-5 take
# hundreds. The second number is for tolerances that float32 cannot reach, so that more evaluations improve nothing.
MOST_EVALUATIONS, MOST_UNREACHABLE_EVALUATIONS = 100_000, 20_000
NEWER = ("reinject_noise", "last_step", "end_time", "fit_grid")  # options that older versions lack
FLOAT32_EPS = torch.finfo(torch.float32).eps
# draw(step): standard normal noise like x, for solvers that add noise; each sample has a separate random stream.
Draw = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class SolverOptions(TimeGridOptions):
    """Solver."""

    on_resume: ClassVar = "freely"

    atol: float = option(1e-5, "absolute tolerance of the adaptive solvers", minimum=0)
    rtol: float = option(1e-5, "relative tolerance of the adaptive solvers", minimum=0)
    churn: float = option(0.0, "heun: EDM's S_churn, amount of noise added over all steps; 0: none", minimum=0)
    churn_noise: float = option(1.0, "heun: EDM's S_noise, scale of the added noise", minimum=0)
    churn_interval: tuple[float, ...] = option(
        (0.0, 1.0), "heun: times LOW HIGH between which churn applies", minimum=0
    )
    diffusion: str = option(
        "sigma", "stochastic, euler_maruyama: diffusion coefficient w(t) of the SDE", choices=DIFFUSIONS
    )
    diffusion_norm: float = option(1.0, "stochastic, euler_maruyama: factor on w(t)", minimum=0)
    reinject_noise: float = option(
        0.0,
        "flow_map: share of a step's noise that is fresh; 0: none, 1: all, as in multistep consistency sampling",
        minimum=0,
        maximum=1,
    )

    def __post_init__(self) -> None:
        if len(self.churn_interval) != 2 or self.churn_interval[0] > self.churn_interval[1]:
            raise UsageError(f"--churn_interval: expected two times LOW <= HIGH, but {self.churn_interval} was given")

    def to_json(self) -> dict[str, Any]:
        """All options, without newer ones that have no effect, so that samples of older versions have equal settings."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value for name, value in values.items() if name not in NEWER or value != getattr(SolverOptions, name)
        }

    def __repr__(self) -> str:
        # Training states, also of older versions, store this text with the score of best.safetensors.
        return f"SolverOptions({', '.join(f'{name}={value!r}' for name, value in self.to_json().items())})"


class Solution(NamedTuple):
    """Samples x [B, C, h, w] at the last time, and the number of velocity evaluations of each, int64 [B]."""

    x: torch.Tensor
    evaluations: torch.Tensor


# solver(velocity, x, times, options, draw) integrates x from times[0] to times[-1]. Fixed-step solvers step from each time
# to the next.
Solver = Callable[[Velocity, torch.Tensor, Sequence[float], SolverOptions, Draw], Solution]


def time_tensor(time: float, x: torch.Tensor) -> torch.Tensor:
    """`time` as a 0-d tensor with x's dtype and device."""
    return torch.full((), time, dtype=x.dtype, device=x.device)


def solution_with_count(x: torch.Tensor, evaluations: int) -> Solution:
    """A solution with the same number of evaluations for every sample."""
    return Solution(x, torch.full((len(x),), evaluations, device=x.device))


def are_unreachable(options: SolverOptions) -> bool:
    """Whether the tolerances are below what float32 resolves, for values of about 1."""
    return options.atol + options.rtol < FLOAT32_EPS


def check_evaluations(options: SolverOptions, count: int) -> None:
    """Check that an adaptive solver has not taken so many evaluations of a batch that it may never end.

    Raises:
        UsageError: it has.
    """
    most = MOST_UNREACHABLE_EVALUATIONS if are_unreachable(options) else MOST_EVALUATIONS
    if count > most:
        raise UsageError(
            f"--method {options.method} has not reached the end after {most:,} evaluations of a batch at --atol "
            f"{options.atol:g} and --rtol {options.rtol:g}: raise the tolerances (1e-5 is usual), or use a fixed-step method"
        )


def select_rows(velocity: Velocity, rows: torch.Tensor) -> Velocity:
    """The velocity of the samples `rows` of the batch, for solvers that drop finished samples.

    A velocity that depends on the sample, for example through its label, must have a method `select_rows`. Any other
    velocity is returned unchanged.
    """
    select: Callable[[torch.Tensor], Velocity] | None = getattr(velocity, "select_rows", None)
    return velocity if select is None else select(rows)


def breakpoints_of(velocity: Velocity) -> list[float]:
    """The times strictly between 1 and 0 at which the velocity jumps, in decreasing order.

    A velocity that jumps at some times must list them in an attribute `breakpoints`, and have a method `restrict`. Any other
    velocity has none. Times within `SHORTEST_PIECE` of another one or of the ends are left out.
    """
    kept = [1.0]
    for time in sorted(getattr(velocity, "breakpoints", ()), reverse=True):
        if kept[-1] - time > SHORTEST_PIECE and time > SHORTEST_PIECE:
            kept.append(time)
    return kept[1:]


def restrict(velocity: Velocity, start: float, end: float) -> Velocity:
    """The velocity between `start` and `end` (in either order), continued smoothly to all times.

    At a breakpoint, it takes the side on which the interval lies, so that all stages of a step agree. The interval should not
    contain breakpoints; if it does, the velocity at its midpoint decides.
    """
    method: Callable[[float, float], Velocity] | None = getattr(velocity, "restrict", None)
    return velocity if method is None else method(start, end)
