"""torchdiffeq's adaptive solvers.

They choose one step size for the whole batch, from an error averaged over it. A sample therefore depends on its batch. They
step past the end and interpolate back, which loses accuracy.
"""

from collections.abc import Sequence

import torch
import torchdiffeq

from flow.ode import Draw, Solution, SolverOptions, Velocity, solution_with_count

__all__ = ["torchdiffeq_solver"]


def torchdiffeq_solver(
    method: str, velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw
) -> Solution:
    """Integrate with torchdiffeq's `method`.

    At a breakpoint inside (0, 1), the last step ends exactly. At 0 and 1 it passes the end, as in LFM's published code.
    """
    counter = _Counter(velocity)
    ends = torch.tensor([times[0], times[-1]], dtype=x.dtype, device=x.device)
    stop = {"step_t": ends[1:]} if 0 < times[-1] < 1 else None
    path = torchdiffeq.odeint(counter, x, ends, method=method, atol=options.atol, rtol=options.rtol, options=stop)
    return solution_with_count(path[-1], counter.evaluations)


class _Counter:
    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.evaluations = 0

    def __call__(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.evaluations += 1
        return self.velocity(t, x)
