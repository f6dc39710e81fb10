"""SplitMeanFlow (Guo et al. 2025, arXiv:2507.16884), which needs no derivative of the network.

A time s splits the interval [until, t]. Displacements add up, so

    (t - until) u(x_t, t, until) = (t - s) u(x_t, t, s) + (s - until) u(x_s, s, until),      x_s = x_t - (t - s) u(x_t, t, s),

and the right side is the target. It holds for any flow, so the steps that train the velocity determine which one is learned.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flow.flow_maps.losses import adaptive_loss
from flow.flow_maps.networks import AverageVelocities
from flow.flow_maps.objective import FlowMap, MapDraws, MapPoint, draw_interval
from flow.flow_maps.options import IntervalOptions
from flow.losses.draws import RandomStreams

__all__ = ["SplitMeanFlow", "SplitMeanFlowOptions"]


@dataclass(frozen=True)
class SplitMeanFlowOptions(IntervalOptions):
    """SplitMeanFlow."""


class SplitMeanFlow(FlowMap[SplitMeanFlowOptions]):
    """SplitMeanFlow. The draws' fraction is the share of the interval from `until` to s."""

    flow_share: ClassVar[float] = 0.75
    locations: ClassVar[tuple[float, float]] = (-0.4, -0.4)

    def draw_interval(self, streams: RandomStreams) -> MapDraws:
        """Two logit-normal times, and a uniform fraction from the stream "split"."""
        return draw_interval(streams, self.options, self.locations)._replace(fraction=streams.uniform("split"))

    def target(self, average: AverageVelocities, point: MapPoint) -> torch.Tensor:
        """The average of both parts' average velocities."""
        assert point.fraction is not None
        middle = point.until + point.fraction * (point.t - point.until)
        lower = point.expand(point.fraction)
        first = average.network(point.t, point.x, middle)
        second = average.network(middle, point.x - (1 - lower) * point.span * first, point.until)
        return (1 - lower) * first + lower * second

    def losses(self, output: Any, target: torch.Tensor, point: MapPoint) -> torch.Tensor:
        """Squared errors [B].

        Adaptive weights would let the comparison of the network with itself, whose errors are small, outweigh the data: with
        p = 1, networks lost the data within a few hundred steps.
        """
        difference = output.to(target.dtype) - target
        return adaptive_loss(difference, self.options.power(0.0), self.options.adaptive_constant)
