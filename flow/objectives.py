"""Training objectives of velocity networks, by name in OBJECTIVES.

An objective draws its times from named random streams, computes one loss per sample, and defines the velocity that a sampler
integrates. The training step and the validation loss use the same objective. LFM's objective is defined here, and objectives
for samples in a few network evaluations in flow/flow_maps/. To add another, register it in OBJECTIVES from a separate file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from flow.flow_maps.alpha_flow import AlphaFlow, AlphaFlowOptions
from flow.flow_maps.consistency import Consistency, ConsistencyOptions
from flow.flow_maps.decoupled_mean_flow import DecoupledMeanFlow, DecoupledMeanFlowOptions
from flow.flow_maps.improved_mean_flow import ImprovedMeanFlow, ImprovedMeanFlowOptions
from flow.flow_maps.mean_flow import MeanFlow, MeanFlowOptions
from flow.flow_maps.reflow import Reflow, ReflowOptions
from flow.flow_maps.shortcut import Shortcut, ShortcutOptions
from flow.flow_maps.split_mean_flow import SplitMeanFlow, SplitMeanFlowOptions
from flow.guidance import Network
from flow.losses.draws import Draws, RandomStreams, Times
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
    """A registered objective.

    Args:
        options: its dataclass of options.
        build: the constructor that takes an instance of it.
        trains_averages: whether it trains average velocities, so that the network must take `until`, and evaluates the
            network several times in a step.
        differentiates: whether a step differentiates the network in forward mode, which needs all weights in each process.
        needs_pairs: whether it needs pairs of noise and samples (--pairs).
        keeps_velocity: whether the velocity for until = t is the data's, if targets are not guided.
        needs_flow_steps: whether only the steps that train the velocity (--flow_share) see the data.
    """

    options: type[PathOptions]
    build: Callable[[Any], Objective]
    trains_averages: bool = False
    differentiates: bool = False
    needs_pairs: bool = False
    keeps_velocity: bool = True
    needs_flow_steps: bool = False


OBJECTIVES: dict[str, ObjectiveFamily] = {
    "flow_matching": ObjectiveFamily(FlowMatchingOptions, _flow_matching),
    "mean_flow": ObjectiveFamily(MeanFlowOptions, MeanFlow, trains_averages=True, differentiates=True),
    "improved_mean_flow": ObjectiveFamily(
        ImprovedMeanFlowOptions, ImprovedMeanFlow, trains_averages=True, differentiates=True
    ),
    "decoupled_mean_flow": ObjectiveFamily(
        DecoupledMeanFlowOptions, DecoupledMeanFlow, trains_averages=True, differentiates=True
    ),
    "alpha_flow": ObjectiveFamily(AlphaFlowOptions, AlphaFlow, trains_averages=True),
    "shortcut": ObjectiveFamily(ShortcutOptions, Shortcut, trains_averages=True, needs_flow_steps=True),
    "split_mean_flow": ObjectiveFamily(
        SplitMeanFlowOptions, SplitMeanFlow, trains_averages=True, needs_flow_steps=True
    ),
    "consistency": ObjectiveFamily(ConsistencyOptions, Consistency, trains_averages=True, keeps_velocity=False),
    "reflow": ObjectiveFamily(ReflowOptions, Reflow, needs_pairs=True, keeps_velocity=False),
}


@dataclass(frozen=True)
class ObjectiveOptions:
    """Objective."""

    objective: str = option("flow_matching", "training objective", choices=OBJECTIVES)


def objective_groups() -> tuple[type[PathOptions], ...]:
    """The option dataclasses of all registered objectives."""
    return tuple(dict.fromkeys(family.options for family in OBJECTIVES.values()))
