"""The common part of objectives that train flow maps.

A flow map is given by its average velocity u(x_t, t, until), with x_until = x_t - (t - until) u. For until = t, u is the
velocity. Each objective regresses u to a target without gradients, which it computes from the velocity of a pair of data and
noise and from the network itself:

    loss = distance(u(x_t, t, until), sg(target(x_t, t, until)))

A share of the steps, which one random number per step selects, sets until = t, where the target is the velocity. These steps
train the flow, cost no more than flow matching, and anchor all targets. Validation is the flow's squared error, so that runs of
all objectives compare.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch

from flow.flow_maps.losses import guide_velocity, squared_error
from flow.flow_maps.networks import AverageVelocities, StepNetwork
from flow.flow_maps.options import FewStepOptions, IntervalOptions
from flow.guidance import Network
from flow.losses.draws import RandomStreams, Times, TrainingLosses
from flow.paths import straight_path
from flow.times import logit_normal, training_times

__all__ = ["FlowMap", "MapDraws", "MapPoint", "draw_interval"]

Chosen = TypeVar("Chosen", bound=FewStepOptions)


class MapDraws(NamedTuple):
    """The draws of a few-step objective.

    Args:
        t: later times [N].
        until: earlier times [N]; None: a step that trains the velocity.
        fraction: a number in [0, 1] that the objective needs [N].
        guidance: guidance scales that the network takes as an input [N]; None if it takes none.
        kept: whether the sample's condition was kept, bool [N]; None without guided targets.
        null: the null condition [N]; None without guided targets.
    """

    t: torch.Tensor
    until: torch.Tensor | None = None
    fraction: torch.Tensor | None = None
    guidance: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    null: Any = None


class MapPoint(NamedTuple):
    """A batch of points at which a flow map is trained.

    Args:
        t, until: times [B].
        x: points x_t [B, C, h, w].
        data: the pairs' data [B, C, h, w].
        noise: the pairs' noise [B, C, h, w].
        velocity: the pairs' velocity, guided if targets are [B, C, h, w].
        fraction: the draws' fraction [B].
    """

    t: torch.Tensor
    until: torch.Tensor
    x: torch.Tensor
    data: torch.Tensor
    noise: torch.Tensor
    velocity: torch.Tensor
    fraction: torch.Tensor | None

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """Values [B] as [B, 1, 1, 1]."""
        return values.view(-1, *[1] * (self.x.ndim - 1))

    @property
    def span(self) -> torch.Tensor:
        """t - until [B, 1, 1, 1]."""
        return self.expand(self.t - self.until)


class FlowMap(ABC, Generic[Chosen]):
    """A few-step objective. Subclasses draw intervals of times, and define the target and the distance from it.

    Args:
        options: the objective's.
    """

    flow_share: ClassVar[float]  # share of steps that train the velocity, unless the options set it

    def __init__(self, options: Chosen) -> None:
        self.options = options

    def draw(self, streams: RandomStreams) -> MapDraws:
        """Draw the times of a step: until = t for all samples in a share of the steps, else an interval for each sample."""
        share = self.flow_share if self.options.flow_share is None else self.options.flow_share
        if streams.number("flow step") < share:
            return MapDraws(training_times(streams.uniform("time"), self.options))
        return self.draw_interval(streams)

    @abstractmethod
    def draw_interval(self, streams: RandomStreams) -> MapDraws:
        """Draw an interval of times for each sample."""

    @abstractmethod
    def target(self, average: AverageVelocities, point: MapPoint) -> torch.Tensor:
        """The target of the average velocity [B, C, h, w]."""

    @abstractmethod
    def losses(self, output: Any, target: torch.Tensor, point: MapPoint) -> torch.Tensor:
        """Losses [B] of the network's output at `point`, where the velocity's target is the velocity."""

    def flow_losses(self, output: Any, point: MapPoint) -> torch.Tensor:
        """Losses [B] of a step that trains the velocity."""
        return self.losses(output, point.velocity, point)

    def inputs(self) -> dict[str, Any]:
        """Further inputs of the network in a step."""
        return {}

    def guidance_weights(self, draws: MapDraws) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights omega and kappa of guided targets [B]."""
        return torch.full_like(draws.t, self.options.target_omega), torch.full_like(draws.t, self.options.target_kappa)

    def at(self, t: torch.Tensor) -> Times:
        """The draws for validation at the given times t [N], with until = t."""
        return Times(t)

    def loss(
        self, network: Network, data: torch.Tensor, noise: torch.Tensor, draws: Times | MapDraws, condition: Any
    ) -> torch.Tensor:
        """Losses [B] of a training step, or for `Times`, the velocity's squared error."""
        if not isinstance(draws, Times):
            return self.training_losses(network, data, noise, draws, condition).total
        x_t, velocity = straight_path(draws.t, data, noise, self.options.sigma_min)
        return squared_error(network(draws.t, x_t, condition).to(x_t.dtype) - velocity)

    def training_losses(
        self, network: Network, data: torch.Tensor, noise: torch.Tensor, draws: MapDraws, condition: Any
    ) -> TrainingLosses:
        """The losses of a training step. The logged loss is the squared error of the target, without weights."""
        networks, is_flow = StepNetwork.of(network), draws.until is None
        guidance = self._guidance(draws)
        point = self._point(networks, data, noise, draws, condition, guidance)
        target = point.velocity if is_flow else self.target(networks.bind(condition, guidance), point).detach()
        inputs = self.inputs() | ({} if guidance is None else {"guidance": guidance})
        output = networks(point.t, point.x, condition, until=point.until, **inputs)
        total = self.flow_losses(output, point) if is_flow else self.losses(output, target, point)
        error = squared_error(_velocity_of(output).detach().to(target.dtype) - target)
        return TrainingLosses(total, {"loss": error})

    def velocity(self, network: Network) -> Network:
        """The network, whose result for until = t is the velocity."""
        return network

    def _guidance(self, draws: MapDraws) -> torch.Tensor | None:
        """The guidance scales [B] that the network gets, 1 for the null condition."""
        if draws.guidance is None or draws.kept is None:
            return draws.guidance
        return torch.where(draws.kept, draws.guidance, 1.0)

    def _point(
        self,
        network: StepNetwork,
        data: torch.Tensor,
        noise: torch.Tensor,
        draws: MapDraws,
        condition: Any,
        guidance: torch.Tensor | None,
    ) -> MapPoint:
        t, until = draws.t, draws.t if draws.until is None else draws.until
        x, velocity = straight_path(t, data, noise, self.options.sigma_min)
        if draws.kept is not None:
            low, high = self.options.target_interval
            guided = draws.kept & (t >= low) & (t <= high)
            weights = self.guidance_weights(draws)
            velocity = guide_velocity(network, t, x, velocity, condition, draws.null, guided, weights, guidance)
        return MapPoint(t, until, x, data, noise, velocity, draws.fraction)


def draw_interval(streams: RandomStreams, options: IntervalOptions, locations: tuple[float, float]) -> MapDraws:
    """Draw two logit-normal times for each sample; the later is t and the earlier is `until`.

    Args:
        streams: the step's random numbers.
        options: may replace the locations, and have the scale.
        locations: of both times.
    """
    first, second = options.interval_locations or locations
    one = logit_normal(streams.uniform("time"), first, options.interval_scale)
    other = logit_normal(streams.uniform("until"), second, options.interval_scale)
    return MapDraws(torch.maximum(one, other), torch.minimum(one, other))


def _velocity_of(output: Any) -> torch.Tensor:
    """The velocity in the network's output, which may have a log-variance too."""
    return output if isinstance(output, torch.Tensor) else output.velocity
