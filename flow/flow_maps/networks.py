"""The network of a training step, and the average velocities that few-step objectives read from it.

Targets have no gradients. They use the same random numbers, such as dropout's, as the prediction that follows.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flow.guidance import Network

__all__ = ["AverageVelocities", "AverageVelocity", "StepNetwork", "bind", "total_derivative"]

# torch raises this when its forward-mode derivatives are first used.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

# average_velocity(t [B], x [B, C, h, w], until [B]) is the average velocity [B, C, h, w] over [until, t], with
# x_until = x - (t - until) average_velocity.
AverageVelocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StepNetwork:
    """The network of a training step; a call evaluates `network`.

    Args:
        network: in the run's precision, and possibly compiled or wrapped for several processes.
        bare: the same network without wrappers, in float32, for forward-mode derivatives.
        ema: its average of weights, in the run's precision.
    """

    network: Callable[..., Any]
    bare: Callable[..., Any]
    ema: Callable[..., Any]

    @classmethod
    def of(cls, network: Network) -> "StepNetwork":
        """The network itself if it is one already; else it serves for all three."""
        return network if isinstance(network, StepNetwork) else cls(network, network, network)

    def __call__(self, t: torch.Tensor, x: torch.Tensor, condition: Any, **inputs: Any) -> Any:
        """The network's result, with gradients."""
        return self.network(t, x, condition, **inputs)

    def bind(self, condition: Any, guidance: torch.Tensor | None) -> "AverageVelocities":
        """The average velocities under a condition and, for networks that take one, guidance scales [B]."""
        return AverageVelocities(*(bind(each, condition, guidance) for each in (self.network, self.bare, self.ema)))


class AverageVelocities(NamedTuple):
    """The average velocities of the parts of a `StepNetwork`, without gradients."""

    network: AverageVelocity
    bare: AverageVelocity
    ema: AverageVelocity


def bind(network: Callable[..., Any], condition: Any, guidance: torch.Tensor | None = None) -> AverageVelocity:
    """The network's average velocity under a condition and guidance scales, without gradients, in the dtype of x."""
    inputs = {} if guidance is None else {"guidance": guidance}

    @torch.no_grad()
    def average_velocity(t: torch.Tensor, x: torch.Tensor, until: torch.Tensor) -> torch.Tensor:
        devices = [] if x.device.type == "cpu" else [x.device]
        with torch.random.fork_rng(devices, device_type=x.device.type):
            return network(t, x, condition, until=until, **inputs).to(x.dtype)

    return average_velocity


def total_derivative(
    average_velocity: AverageVelocity,
    t: torch.Tensor,
    x: torch.Tensor,
    until: torch.Tensor,
    velocity: torch.Tensor,
) -> torch.Tensor:
    """The derivative in t [B, C, h, w] of the average velocity u over [until, t] along a path with this velocity,

        du/dt = velocity du/dx + du/dt|_x      (MeanFlow, arXiv:2505.13447, section 4.1),

    by forward-mode differentiation in x's precision. Attention uses plain matrix products, because fused kernels have no
    forward-mode derivative. Wrappers for several processes do not see this evaluation, so `average_velocity` must be the bare
    network's.
    """
    tangents = torch.ones_like(t), velocity
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]), torch.autocast(x.device.type, enabled=False):
        result = torch.func.jvp(lambda t, x: average_velocity(t, x, until), (t, x), tangents)
    return result[1]
