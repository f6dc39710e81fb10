"""The ODE dx/dt = velocity(t, x) from t = 1 (noise) to t = 0 (data): what every solver takes and returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from flow.diffusions import DIFFUSIONS
from flow.grids import GRIDS
from options import UsageError, option

__all__ = [
    "Draw",
    "Solution",
    "Solver",
    "SolverOptions",
    "Velocity",
    "select_rows",
    "solution_with_count",
    "time_tensor",
]

# velocity(t, x): t is a time [] or one a sample [B]; x and the result are [B, C, h, w].
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# draw(step): standard normal noise like x, for solvers that need it; each sample has a stream of its own.
Draw = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class SolverOptions:
    """Solver."""

    on_resume: ClassVar = "freely"

    method: str = option(
        "dopri5",
        "euler, midpoint, heun, rk3, rk4, ab2 (or multistep), ab3, ab4, dpm, stochastic; adaptive: dopri5, "
        "torchdiffeq_dopri5, dopri8, adaptive_heun, bosh3 (docs/solvers.md)",
    )
    num_steps: int = option(40, "intervals of the fixed-step solvers", minimum=0)
    step_size: float | None = option(
        None, "fixed-step solvers: length h of an interval, meaning 1/h of them", minimum=1e-6
    )
    time_grid: str = option("uniform", "fixed-step solvers: how the intervals are spaced", choices=GRIDS)
    time_shift: float = option(
        1.0, "fixed-step solvers: grid t' = s t / (1 + (s - 1) t); below 1, shorter steps near data", minimum=1e-6
    )
    grid_location: float = option(0.0, "logit_normal grid: its location; above 0, shorter steps near noise")
    grid_scale: float = option(1.0, "logit_normal grid: its scale", minimum=1e-6)
    grid_rho: float = option(7.0, "edm grid: its exponent; larger, shorter steps near data", minimum=1e-6)
    atol: float = option(1e-5, "absolute tolerance of the adaptive solvers", minimum=0)
    rtol: float = option(1e-5, "relative tolerance of the adaptive solvers", minimum=0)
    churn: float = option(0.0, "heun: EDM's S_churn, noise renewed over all steps; 0: none", minimum=0)
    churn_noise: float = option(1.0, "heun: EDM's S_noise, scale of the renewed noise", minimum=0)
    churn_interval: tuple[float, ...] = option((0.0, 1.0), "heun: times LOW HIGH between which to churn", minimum=0)
    diffusion: str = option("sigma", "stochastic: diffusion w(t) of the SDE", choices=DIFFUSIONS)
    diffusion_norm: float = option(1.0, "stochastic: factor on w(t)", minimum=0)

    def __post_init__(self) -> None:
        if len(self.churn_interval) != 2 or self.churn_interval[0] > self.churn_interval[1]:
            raise UsageError(f"--churn_interval: expected two times LOW <= HIGH, but {self.churn_interval} was given")

    @property
    def steps(self) -> int:
        """Intervals of the fixed-step solvers, from `step_size` if given, else from `num_steps`."""
        return self.num_steps if self.step_size is None else max(1, round(1 / self.step_size))


class Solution(NamedTuple):
    """Samples x [B, C, h, w] at the last time, and the number of velocity evaluations that each took, int64 [B]."""

    x: torch.Tensor
    evaluations: torch.Tensor


# solver(velocity, x, times, options, draw): x at times[0] is carried to times[-1], step by step where steps are fixed.
Solver = Callable[[Velocity, torch.Tensor, Sequence[float], SolverOptions, Draw], Solution]


def time_tensor(time: float, x: torch.Tensor) -> torch.Tensor:
    """`time` as a 0-d tensor with x's dtype and device."""
    return torch.full((), time, dtype=x.dtype, device=x.device)


def solution_with_count(x: torch.Tensor, evaluations: int) -> Solution:
    """The solution of a method that evaluates every sample the same number of times."""
    return Solution(x, torch.full((len(x),), evaluations, device=x.device))


def select_rows(velocity: Velocity, rows: torch.Tensor) -> Velocity:
    """The velocity of some samples of its batch, for solvers whose batch shrinks as samples finish.

    A velocity that depends on the sample (through its label, say) has a method `select_rows`; any other is returned as it is.
    """
    select: Callable[[torch.Tensor], Velocity] | None = getattr(velocity, "select_rows", None)
    return velocity if select is None else select(rows)
