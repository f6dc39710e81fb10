"""Inpainting with a network that was not trained for it, by restoring the known region at every step.

After each step from t to s, the known region of x_s is replaced by a point on the path between the known data and fresh
noise (Song et al. 2021, arXiv:2011.13456, appendix I.2). To harmonize the two regions, x_s is noised back to time t and the
step is repeated (resampling; Lugmayr et al. 2022, arXiv:2201.09865, section 4.2). On the path x_t = a_t data + b_t noise,
with a_t = 1 - t and b_t = sigma_min + (1 - sigma_min) t, this noising step is

    x_t = (a_t / a_s) x_s + (b_t^2 - (a_t / a_s)^2 b_s^2)^(1/2) noise.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from flow.ode import Draw, Solution, Velocity, solution_with_count, time_tensor
from flow.paths import straight_path

__all__ = ["replace_known"]


@torch.no_grad()
def replace_known(
    velocity: Velocity,
    x: torch.Tensor,
    times: Sequence[float],
    known: torch.Tensor,
    hole: torch.Tensor,
    draw: Draw,
    *,
    resamplings: int = 1,
    sigma_min: float = 1e-5,
) -> Solution:
    """Integrate by Euler steps from noise at times[0] = 1 to data at times[-1] = 0, with `known` fixed outside the hole.

    Args:
        velocity: velocity(t, x).
        x: noise [B, C, h, w].
        times: decreasing times.
        known: data [B, C, h, w]; its values in the hole are ignored.
        hole: bool [B, 1, h, w], True where data is unknown.
        draw: draw(n) is standard normal noise like x. Each repetition of a step uses two values of n.
        resamplings: how many times each step is taken.
        sigma_min: the share of noise at the data end of the path.
    """
    number = 0
    for t, s in pairwise(times):
        for repetition in range(resamplings):
            x_s = x + (s - t) * velocity(time_tensor(t, x), x)
            at_s = time_tensor(s, x).expand(len(x))
            known_s = known if s == 0 else straight_path(at_s, known, draw(number), sigma_min).x_t
            x = torch.where(hole, x_s, known_s)
            if repetition < resamplings - 1:
                x = _renoise(x, s, t, draw(number + 1), sigma_min)
            number += 2
    return solution_with_count(x, (len(times) - 1) * resamplings)


def _renoise(x: torch.Tensor, s: float, t: float, noise: torch.Tensor, sigma_min: float) -> torch.Tensor:
    """Add noise to take x from time s back to the noisier time t."""
    ratio = (1 - t) / (1 - s)
    variance = _noise_level(t, sigma_min) ** 2 - (ratio * _noise_level(s, sigma_min)) ** 2
    return ratio * x + max(variance, 0.0) ** 0.5 * noise


def _noise_level(t: float, sigma_min: float) -> float:
    return sigma_min + (1 - sigma_min) * t
