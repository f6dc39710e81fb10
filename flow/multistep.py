"""Multistep solvers, which reuse the velocities of earlier steps and take one evaluation per step."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from flow.ode import Draw, Solution, SolverOptions, Velocity, solution_with_count, time_tensor
from flow.runge_kutta import TABLEAUS, combine, slopes_of_step

__all__ = ["adams_bashforth", "dpm_solver"]

# Runge-Kutta methods for the first steps, by the order of the multistep method. One order less suffices, because there are
# only a few such steps.
STARTS = {2: TABLEAUS["euler"], 3: TABLEAUS["heun"], 4: TABLEAUS["rk3"]}


def adams_bashforth(
    order: int, velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw
) -> Solution:
    """Adams-Bashforth method of `order` on any time grid (Hairer, Norsett & Wanner 1993, sections III.1 and III.5).

    The first `order` - 1 intervals use a Runge-Kutta method of one order less. With `order` 2, this is Euler's method, so
    every step takes exactly one evaluation.
    """
    past: list[float] = []
    slopes: list[torch.Tensor] = []  # velocities at the times in `past`, newest first
    evaluations = 0
    for start, end in pairwise(times):
        if len(slopes) < order - 1:
            tableau = STARTS[order]
            stages = slopes_of_step(tableau, velocity, x, start, end)
            slope, mean, used = stages[0], combine(tableau.weights, stages), len(stages)
        else:
            slope, used = velocity(time_tensor(start, x), x), 1
            mean = combine(mean_weights([start, *past], end), [slope, *slopes])
        x = x + (end - start) * mean
        past, slopes = [start, *past][: order - 1], [slope, *slopes][: order - 1]
        evaluations += used
    return solution_with_count(x, evaluations)


def dpm_solver(
    velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw
) -> Solution:
    """DPM-Solver++(2M) for the straight path (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    With alpha = 1 - t, sigma = t, half log-SNR l = log(alpha / sigma) and the data prediction D = x - t v,

        x_end = (end / start) x + (1 - end / start) [D + h / (2 h_before) (D - D_before)],    h = l_end - l_start.

    Three steps have first order and equal Euler's method: the first and last because l is infinite at t = 1 and t = 0, and
    the second because h_before is infinite.
    """
    before: tuple[float, torch.Tensor] | None = None
    for start, end in pairwise(times):
        data = prediction = x - start * velocity(time_tensor(start, x), x)
        if before is not None and end > 0:
            ratio = (_log_snr(end) - _log_snr(start)) / (_log_snr(start) - _log_snr(before[0]))
            prediction = data + ratio / 2 * (data - before[1])
        x = end / start * x + (1 - end / start) * prediction
        before = start, data
    return solution_with_count(x, len(times) - 1)


def mean_weights(nodes: Sequence[float], end: float) -> list[float]:
    """Weights that turn values at `nodes` into the mean of their interpolating polynomial over [nodes[0], end]."""
    scaled = (torch.tensor(nodes, dtype=torch.float64) - nodes[0]) / (end - nodes[0])
    powers = torch.arange(len(nodes), dtype=torch.float64)
    monomial_means = 1 / (powers + 1)  # the mean of s^m over [0, 1]
    return torch.linalg.solve(scaled[None, :] ** powers[:, None], monomial_means).tolist()


def _log_snr(time: float) -> float:
    return math.log((1 - time) / time) if time < 1 else -math.inf
