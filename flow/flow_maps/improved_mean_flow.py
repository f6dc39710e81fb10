"""Improved MeanFlow (Geng et al. 2025, arXiv:2512.02012).

MeanFlow's target depends on the velocity of the pair through the derivative, which adds noise. Here the derivative is taken
along the network's own velocity u(x_t, t, t). The loss then is a regression to the velocity v alone,

    |V - v|^2,      V = u + (t - until) sg(du/dt).

The guidance scale w can be an input of the network. It is drawn so that log w is uniform, and the target is the guided velocity

    v + (1 - 1/w) (v_w - v_null),

where v_w is the network's velocity at this scale. Its fixed point is w v + (1 - w) v_null. The paper also gives the network a
random interval of guidance; here, `--target_interval` fixes it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from flow.flow_maps.mean_flow import MeanFlow
from flow.flow_maps.networks import AverageVelocities
from flow.flow_maps.objective import MapDraws, MapPoint
from flow.flow_maps.options import IntervalOptions
from flow.losses.draws import RandomStreams
from options import UsageError, option

__all__ = ["ImprovedMeanFlow", "ImprovedMeanFlowOptions"]


@dataclass(frozen=True)
class ImprovedMeanFlowOptions(IntervalOptions):
    """Improved MeanFlow."""

    largest_guidance: float = option(
        1.0,
        "largest guidance scale that the network (--guidance_embedding) takes as an input (8 in the paper); 1: no such input",
        minimum=1,
        maximum=1000,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.takes_guidance and super().guides:
            raise UsageError(
                "--largest_guidance trains a range of guidance scales, so --target_omega and --target_kappa have no effect: "
                "leave them out"
            )

    @property
    def guides(self) -> bool:
        """Whether targets are guided."""
        return super().guides or self.takes_guidance

    @property
    def takes_guidance(self) -> bool:
        """Whether the network gets a guidance scale as an input."""
        return self.largest_guidance > 1


class ImprovedMeanFlow(MeanFlow[ImprovedMeanFlowOptions]):
    """Improved MeanFlow: the derivative along the network's velocity, and guidance scales as an input."""

    flow_share: ClassVar[float] = 0.5

    def draw(self, streams: RandomStreams) -> MapDraws:
        """MeanFlow's draws, and guidance scales from the stream "guidance"."""
        draws = super().draw(streams)
        if not self.options.takes_guidance:
            return draws
        return draws._replace(guidance=self.options.largest_guidance ** streams.uniform("guidance"))

    def guidance_weights(self, draws: MapDraws) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights 1 and 1 - 1/w [B] for scales w that the network takes as an input."""
        if draws.guidance is None:
            return super().guidance_weights(draws)
        return torch.ones_like(draws.t), 1 - 1 / draws.guidance

    def tangent(self, average: AverageVelocities, point: MapPoint) -> torch.Tensor:
        """The network's own velocity."""
        return average.network(point.t, point.x, point.t)
