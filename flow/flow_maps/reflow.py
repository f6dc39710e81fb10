"""Reflow (Liu et al. 2022, arXiv:2209.03003): flow matching on pairs of noise and the sample that a trained flow makes of it.

Such pairs can be joined by straighter lines, so a second flow needs fewer steps. Lee et al. (2024, arXiv:2405.20320) add a
pseudo-Huber loss, and times that are more frequent near 0 and 1 (`--time_sampling u_shaped`); their perceptual loss is not part
of this. The pairs come from `python -m datasets_prep.build_pairs`. Any network can be trained, also one without `until`.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flow.flow_maps.losses import pseudo_huber, squared_error
from flow.guidance import Network
from flow.losses.draws import RandomStreams, Times
from flow.paths import PathOptions, straight_path
from flow.times import training_times
from options import option

__all__ = ["Reflow", "ReflowOptions"]


@dataclass(frozen=True)
class ReflowOptions(PathOptions):
    """Reflow."""

    pairs: str = option("", "reflow: folder of pairs, from python -m datasets_prep.build_pairs", on_resume="on_request")
    reflow_huber: float = option(
        0.0,
        "reflow: c of the pseudo-Huber loss per square root of the latents' size (0.00054 in the paper); 0: squared error",
        minimum=0,
    )


class ReflowDraws(NamedTuple):
    """The draws of a training step: times t [N]."""

    t: torch.Tensor


class Reflow:
    """Flow matching on pairs of noise and samples, with a choice of losses.

    Args:
        options: path, training times and loss.
    """

    def __init__(self, options: ReflowOptions) -> None:
        self.options = options

    def draw(self, streams: RandomStreams) -> ReflowDraws:
        """Times [N] from the stream "time"."""
        return ReflowDraws(training_times(streams.uniform("time"), self.options))

    def at(self, t: torch.Tensor) -> Times:
        """The given times, as draws for validation."""
        return Times(t)

    def loss(
        self, network: Network, data: torch.Tensor, noise: torch.Tensor, draws: Times | ReflowDraws, condition: Any
    ) -> torch.Tensor:
        """Losses [B] of the velocity; in validation, mean squared errors."""
        x_t, velocity = straight_path(draws.t, data, noise, self.options.sigma_min)
        difference = network(draws.t, x_t, condition).to(x_t.dtype) - velocity
        if isinstance(draws, Times) or not self.options.reflow_huber:
            return squared_error(difference)
        return pseudo_huber(difference, self.options.reflow_huber * math.sqrt(difference[0].numel()))

    def velocity(self, network: Network) -> Network:
        """The network itself."""
        return network
