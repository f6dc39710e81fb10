"""MeanFlow (Geng et al. 2025, arXiv:2505.13447).

The average velocity u over [until, t] and the velocity v satisfy the identity

    u = v - (t - until) du/dt,      du/dt = v du/dx + du/dt|_x.

Its right side, with v the velocity of a pair of data and noise, is the target. It has the right conditional mean, because it is
linear in v.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from flow.flow_maps.losses import adaptive_loss
from flow.flow_maps.networks import AverageVelocities, total_derivative
from flow.flow_maps.objective import FlowMap, MapDraws, MapPoint, draw_interval
from flow.flow_maps.options import IntervalOptions
from flow.losses.draws import RandomStreams

__all__ = ["MeanFlow", "MeanFlowOptions"]

Chosen = TypeVar("Chosen", bound=IntervalOptions)


@dataclass(frozen=True)
class MeanFlowOptions(IntervalOptions):
    """MeanFlow."""


class MeanFlow(FlowMap[Chosen]):
    """MeanFlow: the derivative along the velocity of the pair."""

    flow_share: ClassVar[float] = 0.75
    locations: ClassVar[tuple[float, float]] = (-0.4, -0.4)

    def draw_interval(self, streams: RandomStreams) -> MapDraws:
        """Two logit-normal times, in their order."""
        return draw_interval(streams, self.options, self.locations)

    def target(self, average: AverageVelocities, point: MapPoint) -> torch.Tensor:
        """The velocity minus (t - until) du/dt."""
        tangent = self.tangent(average, point)
        derivative = total_derivative(average.bare, point.t, point.x, point.until, tangent)
        return point.velocity - point.span * derivative

    def tangent(self, average: AverageVelocities, point: MapPoint) -> torch.Tensor:
        """The velocity along which the average velocity is differentiated."""
        return point.velocity

    def losses(self, output: Any, target: torch.Tensor, point: MapPoint) -> torch.Tensor:
        """Adaptively weighted squared errors [B]."""
        difference = output.to(target.dtype) - target
        return adaptive_loss(difference, self.options.power(1.0), self.options.adaptive_constant)
