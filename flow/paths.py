"""Probability paths from data (t = 0) to noise (t = 1).

LFM's straight path (Dao et al. 2023, eq. 3), where a share s = sigma_min of the noise remains at t = 0:

    x_t = (1 - t) data + (s + (1 - s) t) noise,      velocity = d x_t / dt = (1 - s) noise - data.

It is the conditional optimal-transport path of Lipman et al. (2023, arXiv:2210.02747, eq. 22 and 23) with time reversed:
for t' = 1 - t, x_t = (1 - (1 - s) t') noise + t' data and dx / dt' = data - (1 - s) noise = -velocity.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flow.couplings import COUPLINGS
from flow.times import TimeOptions
from options import option

__all__ = ["PathOptions", "PathSample", "straight_path", "straight_velocity"]


@dataclass(frozen=True)
class PathOptions(TimeOptions):
    """Path and training times."""

    sigma_min: float = option(1e-5, "share of noise that remains at the data end of the path", minimum=0, maximum=1)
    coupling: str = option(
        "independent",
        "pairing of noise and data in each process's batch; optimal_transport exchanges noise within a class",
        choices=COUPLINGS,
    )


class PathSample(NamedTuple):
    """A point on the path and the velocity there, both [B, C, h, w]."""

    x_t: torch.Tensor
    velocity: torch.Tensor


def straight_path(t: torch.Tensor, data: torch.Tensor, noise: torch.Tensor, sigma_min: float = 1e-5) -> PathSample:
    """LFM's path at times t [B] between data and noise, both [B, C, h, w]."""
    t = t.view(-1, *[1] * (data.ndim - 1))
    x_t = (1 - t) * data + (sigma_min + (1 - sigma_min) * t) * noise
    return PathSample(x_t, straight_velocity(data, noise, sigma_min))


def straight_velocity(data: torch.Tensor, noise: torch.Tensor, sigma_min: float) -> torch.Tensor:
    """The velocity of LFM's path between data and noise, the same at all times [B, C, h, w]."""
    return (1 - sigma_min) * noise - data
