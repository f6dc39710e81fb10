"""Training objectives of velocity networks, by name in OBJECTIVES.

An objective draws its times from named random streams, computes one loss per sample, and defines the velocity that a
sampler integrates. The training step and the validation loss use the same objective. LFM's objective is defined here. To
add another, register it in OBJECTIVES from a separate file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from flow.guidance import Network
from flow.losses.options import FlowMatchingOptions, LossOptions
from flow.losses.predictions import PREDICTIONS
from flow.losses.terms import TrainingDraws, loss_terms
from flow.losses.weightings import WEIGHTINGS
from flow.paths import PathOptions, straight_path
from flow.times import training_times
from options import option

__all__ = [
    "OBJECTIVES",
    "Draws",
    "FlowMatching",
    "Objective",
    "ObjectiveFamily",
    "ObjectiveOptions",
    "RandomStreams",
    "Times",
    "objective_groups",
]

# A named tuple of tensors [N, ...], with one entry per sample of the batch, of None, and of further such named tuples.
Draws = tuple[Any, ...]


class RandomStreams(Protocol):
    """The random numbers of one training step, by purpose; a new purpose does not change the numbers of other purposes."""

    step: int  # number of the step, from 0

    def uniform(self, purpose: str) -> torch.Tensor:
        """Uniform numbers [N] in [0, 1), one per sample of the global batch."""
        ...

    def normal(self, purpose: str) -> torch.Tensor:
        """Standard normal numbers [N, C, h, w], with the shape of the global batch's latents."""
        ...


class Objective(Protocol):
    """A training objective."""

    def draw(self, streams: RandomStreams) -> Draws:
        """Draw one step's random quantities for all N samples of the global batch; each process then uses its own rows."""
        ...

    def at(self, t: torch.Tensor) -> Draws:
        """The draws for validation at the given times t [N]."""
        ...

    def loss(
        self, network: Network, data: torch.Tensor, noise: torch.Tensor, draws: Any, condition: Any
    ) -> torch.Tensor:
        """Losses [B], one per sample.

        Args:
            network: network(t, x, condition), in the run's precision.
            data: latents [B, C, h, w].
            noise: standard normal, like `data`.
            draws: the batch's rows of the value returned by `draw` or `at`.
            condition: a named tuple whose fields are tensors [B, ...] or None.
        """
        ...

    def velocity(self, network: Network) -> Network:
        """The velocity that a sampler integrates, given the trained network."""
        ...


class Times(NamedTuple):
    """The draws of plain flow matching: times t [N] in [0, 1]."""

    t: torch.Tensor


class FlowMatching:
    """LFM's objective (Dao et al. 2023, eq. 6): mean squared error of the velocity along the straight path.

    The network predicts the velocity, or something that it can be read from. Training can add terms to the loss and weight it
    over time. The loss at given times, for validation, is always the squared error of the velocity alone, so that runs with
    other terms or weights compare.

    Args:
        options: the path and the distribution of training times.
        losses: the network's target, and terms and weights of the training loss.
    """

    def __init__(self, options: PathOptions, losses: LossOptions = LossOptions()) -> None:  # noqa: B008
        self.options = options
        self.losses = losses
        self._terms = loss_terms(losses)

    def draw(self, streams: RandomStreams) -> Times | TrainingDraws:
        """Times [N] from the stream "time", with weights if any option changes the training loss."""
        t = training_times(streams.uniform("time"), self.options)
        return TrainingDraws(t, WEIGHTINGS[self.losses.loss_weighting](t)) if self.losses.changes_loss else Times(t)

    def at(self, t: torch.Tensor) -> Times:
        """The given times, as draws."""
        return Times(t)

    def loss(
        self,
        network: Network,
        data: torch.Tensor,
        noise: torch.Tensor,
        draws: Times | TrainingDraws,
        condition: Any,
    ) -> torch.Tensor:
        """Squared error of the velocity [B], averaged over channels and positions; with `TrainingDraws`, the training loss."""
        x_t, velocity = straight_path(draws.t, data, noise, self.options.sigma_min)
        predicted = self.velocity(network)(draws.t, x_t, condition).float()
        squared = (predicted - velocity).square().flatten(1).mean(1)
        if isinstance(draws, Times):
            return squared
        return draws.weight * sum((term(predicted, velocity, draws) for term in self._terms), start=squared)

    def velocity(self, network: Network) -> Network:
        """The velocity that the network's output stands for; the network itself if it predicts the velocity."""
        return PREDICTIONS[self.losses.prediction](network, self.options.sigma_min)


def _flow_matching(options: FlowMatchingOptions) -> FlowMatching:
    return FlowMatching(options, options)


class ObjectiveFamily(NamedTuple):
    """A registered objective: its dataclass of options, and the constructor that takes an instance of it."""

    options: type[PathOptions]
    build: Callable[[Any], Objective]


OBJECTIVES: dict[str, ObjectiveFamily] = {"flow_matching": ObjectiveFamily(FlowMatchingOptions, _flow_matching)}


@dataclass(frozen=True)
class ObjectiveOptions:
    """Objective."""

    objective: str = option("flow_matching", "training objective", choices=OBJECTIVES)


def objective_groups() -> tuple[type[PathOptions], ...]:
    """The option dataclasses of all registered objectives."""
    return tuple(dict.fromkeys(family.options for family in OBJECTIVES.values()))
