"""Inpainting with a network that was never trained for it: what is known is put back at every step.

After each step from t to s the known part of x_s is replaced by a point on the path between the known data and fresh
noise (Song et al. 2021, arXiv:2011.13456, appendix I.2). So that both parts come to fit each other, the step is repeated
from a point that noise leads back from s to t (resampling, Lugmayr et al. 2022, arXiv:2201.09865, section 4.2). On the
path x_t = a_t data + b_t noise with a_t = 1 - t, b_t = s_min + (1 - s_min) t this way back is

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
    """Integrate by Euler steps from noise x [B, C, h, w] at times[0] = 1 to data at times[-1] = 0, where `known` stays.

    Args:
        velocity: velocity(t, x).
        x: noise.
        times: falling times.
        known: data [B, C, h, w]; its values in the hole do not matter.
        hole: bool [B, 1, h, w], True where data is unknown.
        draw: standard normal noise like x by number, two for each step that is taken.
        resamplings: how often every step is taken.
        sigma_min: of the path.
    """
    number = 0
    for t, s in pairwise(times):
        for repetition in range(resamplings):
            later = x + (s - t) * velocity(time_tensor(t, x), x)
            at_s = time_tensor(s, x).expand(len(x))
            fixed = known if s == 0 else straight_path(at_s, known, draw(number), sigma_min).x_t
            later = torch.where(hole, later, fixed)
            if repetition < resamplings - 1:
                later = _back(later, s, t, draw(number + 1), sigma_min)
            x, number = later, number + 2
    return solution_with_count(x, (len(times) - 1) * resamplings)


def _back(x: torch.Tensor, s: float, t: float, noise: torch.Tensor, sigma_min: float) -> torch.Tensor:
    """A point at the noisier time t that leads to x at time s."""
    ratio = (1 - t) / (1 - s)
    variance = _noise_level(t, sigma_min) ** 2 - (ratio * _noise_level(s, sigma_min)) ** 2
    return ratio * x + max(variance, 0.0) ** 0.5 * noise


def _noise_level(t: float, sigma_min: float) -> float:
    return sigma_min + (1 - sigma_min) * t
