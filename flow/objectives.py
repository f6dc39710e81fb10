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
    """The draws of flow matching: times t [N] in [0, 1]."""

    t: torch.Tensor


class FlowMatching:
    """LFM's objective (Dao et al. 2023, eq. 6): mean squared error of the velocity along the straight path.

    Args:
        options: the path and the distribution of training times.
    """

    def __init__(self, options: PathOptions) -> None:
        self.options = options

    def draw(self, streams: RandomStreams) -> Times:
        """Times [N] from the stream "time"."""
        return Times(training_times(streams.uniform("time"), self.options))

    def at(self, t: torch.Tensor) -> Times:
        """The given times, as draws."""
        return Times(t)

    def loss(
        self, network: Network, data: torch.Tensor, noise: torch.Tensor, draws: Times, condition: Any
    ) -> torch.Tensor:
        """Squared error of the velocity [B], averaged over channels and positions."""
        x_t, velocity = straight_path(draws.t, data, noise, self.options.sigma_min)
        predicted = network(draws.t, x_t, condition).float()
        return (predicted - velocity).square().flatten(1).mean(1)

    def velocity(self, network: Network) -> Network:
        """The network itself."""
        return network


class ObjectiveFamily(NamedTuple):
    """A registered objective: its dataclass of options, and the constructor that takes an instance of it."""

    options: type[PathOptions]
    build: Callable[[Any], Objective]


OBJECTIVES: dict[str, ObjectiveFamily] = {"flow_matching": ObjectiveFamily(PathOptions, FlowMatching)}


@dataclass(frozen=True)
class ObjectiveOptions:
    """Objective."""

    objective: str = option("flow_matching", "training objective", choices=OBJECTIVES)


def objective_groups() -> tuple[type[PathOptions], ...]:
    """The option dataclasses of all registered objectives."""
    return tuple(dict.fromkeys(family.options for family in OBJECTIVES.values()))
