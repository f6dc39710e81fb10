"""Decoupled MeanFlow (Lee et al. 2025, arXiv:2510.24474), which turns a trained flow into a flow map.

Half of the steps train the velocity, and half train MeanFlow's target. With the mean squared error m and a learned log-variance
L of (t, until), both have the loss

    log(exp(-L) m + c) + L  =  log(m + c exp(L)).

Its gradient in u equals the gradient of m / sg(m + c exp(L)). This is MeanFlow's adaptive weight with a learned constant. L
falls slowly, because the loss grows with L everywhere.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flow.flow_maps.losses import squared_error
from flow.flow_maps.mean_flow import MeanFlow
from flow.flow_maps.objective import MapPoint
from flow.flow_maps.options import IntervalOptions
from options import option

__all__ = ["DecoupledMeanFlow", "DecoupledMeanFlowOptions"]


@dataclass(frozen=True)
class DecoupledMeanFlowOptions(IntervalOptions):
    """Decoupled MeanFlow."""

    learned_variance: bool = option(
        True, "decoupled_mean_flow: weight the loss by the network's log-variance (--log_variance_head)"
    )

    @property
    def learns_variance(self) -> bool:
        """Whether the network's log-variance weights the loss."""
        return self.learned_variance


class DecoupledMeanFlow(MeanFlow[DecoupledMeanFlowOptions]):
    """Decoupled MeanFlow: the logarithm of the squared error, with a learned log-variance."""

    flow_share: ClassVar[float] = 0.5
    locations: ClassVar[tuple[float, float]] = (0.4, -1.2)

    def inputs(self) -> dict[str, Any]:
        """Ask the network for its log-variance, if the loss uses it."""
        return {"log_variance": True} if self.options.learned_variance else {}

    def losses(self, output: Any, target: torch.Tensor, point: MapPoint) -> torch.Tensor:
        """log(m + c exp(L)) [B]; L = 0 without a learned log-variance."""
        constant: Any = self.options.adaptive_constant
        if self.options.learned_variance:
            output, log_variance = output
            constant = constant * log_variance.to(target.dtype).exp()
        return (squared_error(output.to(target.dtype) - target) + constant).log()
