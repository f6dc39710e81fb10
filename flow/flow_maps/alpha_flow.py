"""alpha-Flow (Zhang et al. 2025, arXiv:2510.20771), which needs no derivative of the network.

A first part alpha of the interval [until, t] follows the pair's velocity v to s = t - alpha (t - until), and the network covers
the rest:

    |u(x_t, t, until) - target|^2 / alpha,      target = alpha v + (1 - alpha) u(x_t - (t - s) v, s, until).

alpha = 1 regresses u to v (trajectory flow matching). For alpha -> 0, the gradient tends to MeanFlow's. alpha falls from 1
during the run by a sigmoid and stays above `--alpha_min`. Then the errors divided by alpha are MeanFlow's with a finite
difference in place of the derivative, so the loss weights them as MeanFlow does.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flow.flow_maps.losses import adaptive_loss
from flow.flow_maps.networks import AverageVelocities
from flow.flow_maps.objective import FlowMap, MapDraws, MapPoint, draw_interval
from flow.flow_maps.options import IntervalOptions
from flow.losses.draws import RandomStreams
from options import UsageError, option

__all__ = ["AlphaFlow", "AlphaFlowOptions", "alpha_at"]

STEEPNESS = 25.0  # of the sigmoid over the schedule's part of the run


@dataclass(frozen=True)
class AlphaFlowOptions(IntervalOptions):
    """alpha-Flow."""

    alpha_min: float = option(0.005, "least alpha of alpha_flow", minimum=1e-6, maximum=1)
    alpha_schedule: tuple[float, ...] = option(
        (0.0, 1.0), "shares START END of the run between which alpha falls from 1", minimum=0, maximum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.alpha_schedule) != 2 or self.alpha_schedule[0] >= self.alpha_schedule[1]:
            given = " ".join(map(str, self.alpha_schedule))
            raise UsageError(f"--alpha_schedule: expected two shares START < END of the run, but {given} was given")


def alpha_at(progress: float, options: AlphaFlowOptions) -> float:
    """alpha at a share of the run; exactly 1 while it is within `alpha_min` of 1."""
    start, end = options.alpha_schedule
    position = (progress - start) / (end - start) - 0.5
    alpha = 1 / (1 + math.exp(STEEPNESS * max(-1.0, min(1.0, position))))
    return 1.0 if alpha > 1 - options.alpha_min else max(alpha, options.alpha_min)


class AlphaFlow(FlowMap[AlphaFlowOptions]):
    """alpha-Flow. The draws' fraction is alpha; without one, it is 1."""

    flow_share: ClassVar[float] = 0.5
    locations: ClassVar[tuple[float, float]] = (-0.4, -0.4)

    def draw_interval(self, streams: RandomStreams) -> MapDraws:
        """Two logit-normal times, and alpha at this step of the run."""
        draws = draw_interval(streams, self.options, self.locations)
        alpha = alpha_at(streams.step / max(1, streams.last_step), self.options)
        return draws if alpha == 1 else draws._replace(fraction=torch.full_like(draws.t, alpha))

    def target(self, average: AverageVelocities, point: MapPoint) -> torch.Tensor:
        """The velocity over the first part of the interval, and the network over the rest."""
        if point.fraction is None:
            return point.velocity
        alpha = point.expand(point.fraction)
        middle = point.t - point.fraction * (point.t - point.until)
        rest = average.network(middle, point.x - alpha * point.span * point.velocity, point.until)
        return alpha * point.velocity + (1 - alpha) * rest

    def losses(self, output: Any, target: torch.Tensor, point: MapPoint) -> torch.Tensor:
        """Adaptively weighted squared errors [B], where errors count by alpha."""
        difference = output.to(target.dtype) - target
        power, constant = self.options.power(1.0), self.options.adaptive_constant
        if point.fraction is None:
            return adaptive_loss(difference, power, constant)
        return point.fraction * adaptive_loss(difference / point.expand(point.fraction), power, constant)
