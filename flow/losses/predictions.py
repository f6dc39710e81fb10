"""The network's target, and the velocity that its output stands for.

On the path x_t = (1 - t) data + a noise with a = s + (1 - s) t (flow/paths.py), the velocity is

    velocity = (1 - s) noise - data = ((1 - s) x_t - data) / a.

A network that predicts the data defines a velocity by this equation, with a replaced by max(a, 0.05) (Li & He 2025,
arXiv:2511.13720, "JiT", x-prediction with v-loss). Every velocity corresponds to one output, so the loss, its minimum and all
uses of the velocity are unchanged. Where a is at least 0.05, the output of the best network is E[data | x_t]; nearer to data,
it is x_t - 0.05 E[velocity | x_t], up to s. JiT clamps the target's denominator as well, which changes the minimum there.
"""

from collections.abc import Callable
from typing import Any

import torch

from flow.guidance import Network

__all__ = ["LEAST_NOISE", "PREDICTIONS"]

LEAST_NOISE = 0.05


def _itself(network: Network, sigma_min: float) -> Network:
    return network


def _from_data(network: Network, sigma_min: float) -> Network:
    slope = 1 - sigma_min

    def velocity(t: torch.Tensor, x: torch.Tensor, condition: Any, **others: Any) -> torch.Tensor:
        noise = (sigma_min + slope * t).clamp(min=LEAST_NOISE).view(-1, *[1] * (x.ndim - 1))
        return (slope * x - network(t, x, condition, **others)) / noise

    return velocity


# The velocity network of a network with this output, given sigma_min.
PREDICTIONS: dict[str, Callable[[Network, float], Network]] = {"velocity": _itself, "data": _from_data}
