"""Easy consistency tuning (Geng et al. 2024, arXiv:2406.14548), from a trained flow.

f(x_t, t) = x_t - t u(x_t, t, 0) should be the same point of the data along a whole trajectory. The target at t is f at an
earlier time r of the same pair of data and noise:

    (sqrt(|f(x_t, t) - sg(f(x_r, r))|^2 + c^2) - c) / (t - r),      r = t (1 - q^-k).

k = 0, 1, ... is the stage of the run. At stage 0, r is 0 and the target is the data, as for a denoiser. Later stages move r
towards t. c grows with the square root of the latents' size. The objective trains until = 0 only, so samples need the flow map,
and several steps need new noise in between. The paper's factor n(t) of q^-k is 1 here.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flow.flow_maps.losses import pseudo_huber, squared_error
from flow.flow_maps.networks import AverageVelocities
from flow.flow_maps.objective import FlowMap, MapDraws, MapPoint
from flow.flow_maps.options import FewStepOptions
from flow.losses.draws import RandomStreams
from flow.paths import straight_path
from flow.times import training_times
from options import option

__all__ = ["Consistency", "ConsistencyOptions"]

LEAST_TIME = 1e-3  # because losses are divided by the time


@dataclass(frozen=True)
class ConsistencyOptions(FewStepOptions):
    """Consistency."""

    consistency_stages: int = option(8, "consistency: number of equally long stages k of the run", minimum=1)
    consistency_ratio: float = option(2.0, "consistency: q, by which t - r shrinks from stage to stage", minimum=1.01)
    consistency_huber: float = option(
        0.00054, "consistency: c of the pseudo-Huber loss, for each square root of the latents' numbers", minimum=0
    )


class Consistency(FlowMap[ConsistencyOptions]):
    """Consistency tuning. The draws' fraction is r / t, and `until` is 0."""

    flow_share: ClassVar[float] = 0.0

    def draw_interval(self, streams: RandomStreams) -> MapDraws:
        """The times t of --time_sampling, and the stage's r / t."""
        t = training_times(streams.uniform("time"), self.options).clamp(min=LEAST_TIME)
        stages = self.options.consistency_stages
        stage = min(stages - 1, stages * streams.step // max(1, streams.last_step))
        ratio = 1 - self.options.consistency_ratio**-stage
        return MapDraws(t, torch.zeros_like(t), torch.full_like(t, ratio))

    def target(self, average: AverageVelocities, point: MapPoint) -> torch.Tensor:
        """The average velocity that leads from x_t to f(x_r, r)."""
        assert point.fraction is not None
        earlier = point.t * point.fraction
        x_r = straight_path(earlier, point.data, point.noise, self.options.sigma_min).x_t
        end = x_r - point.expand(earlier) * average.network(earlier, x_r, point.until)
        return (point.x - end) / point.expand(point.t)

    def losses(self, output: Any, target: torch.Tensor, point: MapPoint) -> torch.Tensor:
        """Pseudo-Huber distances [B] of f, divided by t - r."""
        assert point.fraction is not None
        difference = point.expand(point.t) * (output.to(target.dtype) - target)
        constant = self.options.consistency_huber * math.sqrt(target[0].numel())
        return pseudo_huber(difference, constant) / (point.t * (1 - point.fraction))

    def flow_losses(self, output: Any, point: MapPoint) -> torch.Tensor:
        """Mean squared errors [B] of the velocity."""
        return squared_error(output.to(point.velocity.dtype) - point.velocity)
