"""torchdiffeq's adaptive solvers.

They choose one step size for the whole batch, from an error averaged over it. A sample therefore depends on its batch. They
step past the end and interpolate back, which loses accuracy.
"""

from collections.abc import Sequence

import torch
import torchdiffeq

from flow.ode import (
    Draw,
    Solution,
    SolverOptions,
    Velocity,
    check_evaluations,
    select_rows,
    solution_with_count,
)
from options import UsageError
from runtime.finite import finite_rows

__all__ = ["torchdiffeq_solver"]


def torchdiffeq_solver(
    method: str, velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw
) -> Solution:
    """Integrate with torchdiffeq's `method`.

    At a breakpoint inside (0, 1), the last step ends exactly. At 0 and 1 it passes the end, as in LFM's published code.
    Samples whose velocity is not finite become NaN, and the others are integrated again without them.

    Raises:
        UsageError: no step size meets the tolerances, or the batch takes too many evaluations.
    """
    counter = _Counter(velocity, x, options)
    ends = torch.tensor([times[0], times[-1]], dtype=x.dtype, device=x.device)
    stop = {"step_t": ends[1:]} if 0 < times[-1] < 1 else None
    try:
        path = torchdiffeq.odeint(counter, x, ends, method=method, atol=options.atol, rtol=options.rtol, options=stop)
    except AssertionError as error:  # the step size became zero or NaN
        good = counter.finite
        if good.all():
            raise UsageError(
                f"--method {options.method} found no step size that meets --atol {options.atol:g} and --rtol "
                f"{options.rtol:g}: raise the tolerances"
            ) from error
        result, evaluations = torch.full_like(x, torch.nan), torch.full((len(x),), counter.evaluations, device=x.device)
        if good.any():
            rows = good.nonzero().flatten()
            again = torchdiffeq_solver(method, select_rows(velocity, rows), x[rows], times, options, draw)
            result[rows], evaluations[rows] = again.x, evaluations[rows] + again.evaluations
        return Solution(result, evaluations)
    return solution_with_count(path[-1], counter.evaluations)


class _Counter:
    """A velocity that counts its evaluations.

    `finite` [B] records for which samples the last one at a finite time, squared in units of the tolerance as in torchdiffeq,
    was finite.
    """

    def __init__(self, velocity: Velocity, x: torch.Tensor, options: SolverOptions) -> None:
        self.velocity, self.options = velocity, options
        self.evaluations = 0
        self.finite = torch.ones(len(x), dtype=torch.bool, device=x.device)

    def __call__(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.evaluations += 1
        check_evaluations(self.options, self.evaluations)
        v = self.velocity(t, x)
        finite = finite_rows((v / self.options.atol).square() if self.options.atol else v)
        # After one such sample, the batch's step size is NaN, and with it the next time and all points.
        self.finite = torch.where(t.isfinite(), finite, self.finite)
        return v
