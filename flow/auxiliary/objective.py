"""An objective with auxiliary losses on the network's tap, and with token routing.

`WithAuxiliary` wraps any objective, whose loss stays the one that is validated and logged as "loss". In training, one forward
pass gives the velocity and the tap. The auxiliary losses are added with their weights, and logged under their own names.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from flow.auxiliary.losses import TapBatch
from flow.flow_maps.objective import FlowMap
from flow.guidance import Network
from flow.losses.draws import Draws, RandomStreams, TrainingLosses
from flow.objectives import Objective

__all__ = [
    "AuxiliaryDraws",
    "Term",
    "WithAuxiliary",
    "auxiliary_names",
    "replace_draws",
    "training_losses",
]


class Term(NamedTuple):
    """A weighted loss on the tap.

    Args:
        weight: factor of the loss.
        loss: the losses [B] of a batch.
        ends: whether the loss ends at the step that `WithAuxiliary` gets.
    """

    weight: float
    loss: Callable[[TapBatch], torch.Tensor]
    ends: bool = True


class AuxiliaryDraws(NamedTuple):
    """The draws of an objective with auxiliary losses.

    Args:
        base: the wrapped objective's draws.
        active: 1 while the losses that end count, else 0 [N]; None if none ends.
        routing: standard normal numbers [N, h, w] that choose the tokens to route; None without routing.
        features: the image encoder's features [N, d, rows, columns], which are read with the data; None without an encoder.
    """

    base: Draws
    active: torch.Tensor | None = None
    routing: torch.Tensor | None = None
    features: torch.Tensor | None = None


def replace_draws(draws: Any, **values: Any) -> Any:
    """Replace fields of an objective's draws. With auxiliary losses, they are the wrapped objective's."""
    if isinstance(draws, AuxiliaryDraws):
        return draws._replace(base=replace_draws(draws.base, **values))
    return draws._replace(**values)


class WithAuxiliary:
    """An objective with auxiliary losses.

    Args:
        objective: any objective, whose loss evaluates the network once.
        terms: the auxiliary losses, by the name in the metrics log.
        until: step at which the terms that end do so; 0: never.
        routes: whether tokens are routed in training.
    """

    def __init__(self, objective: Objective, terms: Mapping[str, Term], until: int = 0, routes: bool = False) -> None:
        self.objective = objective
        self.terms = dict(terms)
        self.until = until
        self.routes = routes

    def draw(self, streams: RandomStreams) -> AuxiliaryDraws:
        """The objective's draws, and the random numbers [N, h, w] of the stream "route"."""
        active = None
        if self.until:
            active = torch.full_like(streams.uniform("time"), float(streams.step < self.until))
        routing = streams.normal("route")[:, 0] if self.routes else None
        return AuxiliaryDraws(self.objective.draw(streams), active, routing)

    def at(self, t: torch.Tensor) -> AuxiliaryDraws:
        """The objective's draws for validation, without routing."""
        return AuxiliaryDraws(self.objective.at(t))

    def loss(
        self, network: Network, data: torch.Tensor, noise: torch.Tensor, draws: AuxiliaryDraws, condition: Any
    ) -> torch.Tensor:
        """The objective's losses [B] alone, which evaluate no auxiliary head."""
        return self.objective.loss(network, data, noise, draws.base, condition)

    def training_losses(
        self, network: Network, data: torch.Tensor, noise: torch.Tensor, draws: AuxiliaryDraws, condition: Any
    ) -> TrainingLosses:
        """The losses of a training step, from one forward pass of the network."""
        recorder = _TapRecorder(network, draws.routing, bool(self.terms))
        total = self.objective.loss(recorder, data, noise, draws.base, condition)
        logged = {"loss": total.detach()}

        def loss_of(velocity: torch.Tensor) -> torch.Tensor:
            return self.objective.loss(lambda t, x, condition, **others: velocity, data, noise, draws.base, condition)

        batch = TapBatch(recorder.tapped, data, draws.features, loss_of)
        for name, term in self.terms.items():
            losses = term.loss(batch)
            logged[name] = losses.detach()
            factor = term.weight * draws.active if term.ends and draws.active is not None else term.weight
            total = total + factor * losses
        return TrainingLosses(total, logged)

    def velocity(self, network: Network) -> Network:
        """The objective's velocity."""
        return self.objective.velocity(network)


class _TapRecorder:
    """A network that remembers what the tap of its first evaluation gave. `routing` [B, h, w] routes its tokens, if given."""

    def __init__(self, network: Callable[..., Any], routing: torch.Tensor | None, tapped: bool) -> None:
        self.network = network
        self.options: dict[str, Any] = {"tapped": True} if tapped else {}
        self.options |= {} if routing is None else {"routing": routing}
        self.tapped: Any = None

    def __call__(self, t: torch.Tensor, x: torch.Tensor, condition: Any, **others: Any) -> torch.Tensor:
        output = self.network(t, x, condition, **others, **self.options)
        if "tapped" not in self.options:
            return output
        velocity, tapped = output
        self.tapped = self.tapped or tapped
        return velocity


def training_losses(
    objective: Objective,
    network: Network,
    data: torch.Tensor,
    noise: torch.Tensor,
    draws: Any,
    condition: Any,
) -> TrainingLosses:
    """The losses of a training step of any objective."""
    if isinstance(objective, WithAuxiliary | FlowMap):
        return objective.training_losses(network, data, noise, draws, condition)
    losses = objective.loss(network, data, noise, draws, condition)
    return TrainingLosses(losses, {"loss": losses.detach()})


def auxiliary_names(objective: Objective) -> tuple[str, ...]:
    """The names under which an objective logs its auxiliary losses."""
    return tuple(objective.terms) if isinstance(objective, WithAuxiliary) else ()
