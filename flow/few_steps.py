"""Sampling by a flow map, in few steps: every step takes one evaluation of the average velocity over it.

With the average velocity u(x_t, s, t) over [s, t], steps of any length are exact (MeanFlow, Geng et al., arXiv:2505.13447):

    x_s = x_t - (t - s) u(x_t, s, t).

A network's errors add up over the steps. Fresh noise can replace them, as in multistep consistency sampling (Song et al. 2023,
arXiv:2303.01469, algorithm 1): a step to s > 0 goes on to s' < s, closer to data, and adds noise up to s. With a share g of
fresh noise (CTM, Kim et al. 2023, arXiv:2310.02279, gamma sampling), and noise-to-data ratios s / (1 - s),

    s' / (1 - s') = (1 - g^2)^(1/2) s / (1 - s),      x_s = (1 - s) / (1 - s') x_s' + g s z,      z ~ N(0, I).

g = 0 is the flow map alone. For g = 1, s' = 0: each step predicts data and noises them.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from flow.ode import Draw, Solution, SolverOptions, Velocity, solution_with_count, time_tensor

__all__ = ["flow_map"]


def flow_map(
    velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw
) -> Solution:
    """Step through `times` with average velocities, and with the share `reinject_noise` of fresh noise after each step."""
    share = options.reinject_noise
    for step, (start, end) in enumerate(pairwise(times)):
        target = _less_noisy(end, share)
        x = x - (start - target) * velocity(time_tensor(start, x), x, until=time_tensor(target, x))
        if target < end:
            x = (1 - end) / (1 - target) * x + share * end * draw(step)
    return solution_with_count(x, len(times) - 1)


def _less_noisy(time: float, share: float) -> float:
    """The time at which the ratio of noise to data is (1 - share^2)^(1/2) times as large."""
    if share == 0:
        return time
    noise = math.sqrt(1 - share**2) * time
    return noise / (1 - time + noise)
