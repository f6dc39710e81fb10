"""Probability paths from data (t = 0) to noise (t = 1).

The straight path of LFM (Dao et al. 2023, eq. 3) with a remainder s of noise at the data's end:

    x_t = (1 - t) data + (s + (1 - s) t) noise,      velocity = d x_t / dt = (1 - s) noise - data.

It is the conditional optimal-transport path of Lipman et al. (2023, arXiv:2210.02747, eq. 22 and 23), whose time runs the
other way: with t' = 1 - t, x_t = (1 - (1 - s) t') noise + t' data and dx / dt' = data - (1 - s) noise = -velocity.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flow.times import TIME_SAMPLINGS
from options import option

__all__ = ["PathOptions", "PathSample", "straight_path"]


@dataclass(frozen=True)
class PathOptions:
    """Path and loss."""

    sigma_min: float = option(1e-5, "share of noise that remains at the data's end of the path", minimum=0, maximum=1)
    time_sampling: str = option(
        "uniform",
        "distribution of training times",
        choices=TIME_SAMPLINGS,
    )
    time_location: float = option(0.0, "location of logit_normal times; above 0 means more noise")
    time_scale: float = option(1.0, "scale of logit_normal times", minimum=0)


class PathSample(NamedTuple):
    """A point on the path, [B, C, h, w], and its velocity there."""

    x_t: torch.Tensor
    velocity: torch.Tensor


def straight_path(t: torch.Tensor, data: torch.Tensor, noise: torch.Tensor, sigma_min: float = 1e-5) -> PathSample:
    """LFM's path at times t [B] between data and noise [B, C, h, w]."""
    t = t.view(-1, *[1] * (data.ndim - 1))
    x_t = (1 - t) * data + (sigma_min + (1 - sigma_min) * t) * noise
    return PathSample(x_t, (1 - sigma_min) * noise - data)
