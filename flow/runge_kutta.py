"""Explicit Runge-Kutta methods, defined by their Butcher tableaus (Hairer, Norsett & Wanner 1993, section II.1)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from flow.ode import Draw, Solution, SolverOptions, Velocity, solution_with_count, time_tensor

__all__ = ["TABLEAUS", "Tableau", "combine", "runge_kutta", "slopes_of_step"]


class Tableau(NamedTuple):
    """Butcher tableau of an explicit method: stage times, stage weights row by row, final weights."""

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


# heun is the trapezoidal rule, as in EDM's deterministic sampler (Karras et al. 2022, algorithm 1). rk3 is Kutta's
# third-order method. rk4 is the 3/8 rule, as in torchdiffeq.
TABLEAUS = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk3": Tableau((0, 1 / 2, 1), ((), (1 / 2,), (-1, 2)), (1 / 6, 2 / 3, 1 / 6)),
    "rk4": Tableau((0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}


def runge_kutta(
    tableau: Tableau,
    velocity: Velocity,
    x: torch.Tensor,
    times: Sequence[float],
    options: SolverOptions,
    draw: Draw,
) -> Solution:
    """Integrate with the explicit Runge-Kutta method of `tableau`."""
    evaluations = 0
    for start, end in pairwise(times):
        slopes = slopes_of_step(tableau, velocity, x, start, end)
        x = x + (end - start) * combine(tableau.weights, slopes)
        evaluations += len(slopes)
    return solution_with_count(x, evaluations)


def slopes_of_step(
    tableau: Tableau, velocity: Velocity, x: torch.Tensor, start: float, end: float
) -> list[torch.Tensor]:
    """The velocities at the stages of one step; the first is the velocity at its start."""
    step = end - start
    slopes: list[torch.Tensor] = []
    for node, row in zip(tableau.nodes, tableau.stages, strict=True):
        point = x + step * combine(row, slopes) if any(row) else x
        slopes.append(velocity(time_tensor(start + node * step, x), point))
    return slopes


def combine(weights: Sequence[float], slopes: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weighted sum of slopes, skipping zero weights."""
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return sum(terms[1:], start=terms[0])
