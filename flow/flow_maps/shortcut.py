"""Shortcut models (Frans et al. 2024, arXiv:2410.12557).

Intervals have the lengths d = 1, 1/2, ..., 2/N and start at multiples of d. The target of a step of length d is the mean of the
two average velocities of length d/2 that lead there, by the network's moving average:

    x' = x_t - d/2 u(x_t, t, t - d/2),      target = (u(x_t, t, t - d/2) + u(x', t - d/2, t - d)) / 2.

The shortest length is a Euler step of the velocity, as in the paper, where the network at 1/N is trained by flow matching. The
paper trains 1/8 of each batch in this way; here it is 1/8 of the steps. Guidance comes from guided velocities instead of guided
shortest steps.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flow.flow_maps.losses import squared_error
from flow.flow_maps.networks import AverageVelocities
from flow.flow_maps.objective import FlowMap, MapDraws, MapPoint
from flow.flow_maps.options import FewStepOptions
from flow.losses.draws import RandomStreams
from options import UsageError, option

__all__ = ["Shortcut", "ShortcutOptions"]

LARGEST_VALUE = 4.0  # of the latents after a half step


@dataclass(frozen=True)
class ShortcutOptions(FewStepOptions):
    """Shortcut."""

    shortcut_steps: int = option(128, "shortcut: N, the largest number of steps, a power of two", minimum=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortcut_steps & (self.shortcut_steps - 1):
            raise UsageError(f"--shortcut_steps {self.shortcut_steps}: expected a power of two")


class Shortcut(FlowMap[ShortcutOptions]):
    """Shortcut models, whose targets are two half steps."""

    flow_share: ClassVar[float] = 0.875

    def draw_interval(self, streams: RandomStreams) -> MapDraws:
        """Lengths d, all equally likely, and multiples of them in (0, 1] as times t."""
        lengths = self.options.shortcut_steps.bit_length() - 1
        count = 2.0 ** (streams.uniform("time") * lengths).floor()  # of intervals of this length
        number = (streams.uniform("until") * count).floor()
        return MapDraws((number + 1) / count, number / count)

    def target(self, average: AverageVelocities, point: MapPoint) -> torch.Tensor:
        """The mean of two half steps; a half step of length 1/N is a Euler step."""
        shortest = (point.t - point.until) * self.options.shortcut_steps < 3
        middle = (point.t + point.until) / 2
        first = average.ema(point.t, point.x, torch.where(shortest, point.t, middle))
        between = (point.x - point.span / 2 * first).clamp(-LARGEST_VALUE, LARGEST_VALUE)
        second = average.ema(middle, between, torch.where(shortest, middle, point.until))
        return (first + second) / 2

    def losses(self, output: Any, target: torch.Tensor, point: MapPoint) -> torch.Tensor:
        """Mean squared errors [B]."""
        return squared_error(output.to(target.dtype) - target)
