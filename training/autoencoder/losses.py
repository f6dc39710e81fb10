"""The training loss as a sum of terms. A new term is one entry of TERMS.

A term may bring modules of its own, such as a discriminator, each with its own optimizer. Their state is saved with the
network's. One backward pass computes all gradients, so a term that trains a module adds the module's own loss to its value,
and keeps the two losses apart: `call_fixed` gives no gradient to the module, and `detach()` none to the network. A term may
also add only one of them, depending on the step, which alternates: weights without a gradient are not updated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.func import functional_call

from models.autoencoders.coding import Coder
from models.autoencoders.training_loss import (
    Reconstruction,
    absolute_error,
    divergence,
    edge_error,
    imbalance,
    reconstruct,
    squared_error,
)
from runtime.precision import Machine
from runtime.randomness import StepDraws
from training.autoencoder.options import AutoencoderTrainingOptions

__all__ = [
    "TERMS",
    "AutoencoderLoss",
    "LossInputs",
    "LossStep",
    "Losses",
    "Term",
    "TermValue",
    "TrainedModule",
    "WeightedTerm",
    "call_fixed",
    "make_loss",
]


class TrainedModule(NamedTuple):
    """A module that a term trains.

    Args:
        module: the module, on the machine's device.
        optimizer: its optimizer, whose parameter groups have an entry "relative_lr", a factor of the learning rate.
        grad_clip: maximum gradient norm; 0: no clipping.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    grad_clip: float = 0.0


class LossInputs(NamedTuple):
    """What a term of the loss may use.

    Args:
        coder: the network, whose weights are `coder.network`.
        found: the batch, encoded and decoded.
        pixels: the batch [B, C, H, W] before transforms and with its padding.
        draws: the step's random numbers.
        step: number of the step, from 0.
        total: the sum of the terms before this one, 0-d, with its graph.
        held_out: whether the loss of held-out images is measured, without gradients.
    """

    coder: Coder
    found: Reconstruction
    pixels: torch.Tensor
    draws: StepDraws
    step: int
    total: torch.Tensor
    held_out: bool


class TermValue(NamedTuple):
    """What a term adds to the loss, 0-d, with its weight; and the values to log, 0-d each, one for each of its names."""

    loss: torch.Tensor
    logged: tuple[torch.Tensor, ...]


class Term(Protocol):
    """A term of the loss.

    Attributes:
        names: names of its logged values.
        modules: modules that it trains, by name.
    """

    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def modules(self) -> Mapping[str, TrainedModule]: ...  # noqa: D102

    def __call__(self, inputs: LossInputs) -> TermValue:
        """Compute the term; the mean over this process's batch."""
        ...


@dataclass(frozen=True)
class WeightedTerm:
    """A term that is a weight times a function of the reconstruction; the function's value is logged."""

    name: str
    weight: float
    measure: Callable[[Reconstruction], torch.Tensor]
    modules: Mapping[str, TrainedModule] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of the logged value."""
        return (self.name,)

    def __call__(self, inputs: LossInputs) -> TermValue:
        """Measure the reconstruction."""
        value = self.measure(inputs.found)
        return TermValue(value if self.weight == 1 else self.weight * value, (value,))


class Losses(NamedTuple):
    """The loss to minimize, 0-d, and the logged values [number of names]."""

    total: torch.Tensor
    logged: torch.Tensor


class AutoencoderLoss:
    """The sum of terms.

    Args:
        terms: the terms; later ones see the sum of earlier ones.
        options: noise and transforms of the latents that the decoder sees.
        border: width of the images' padding in pixels, which is not compared.
    """

    def __init__(self, terms: tuple[Term, ...], options: AutoencoderTrainingOptions, border: int) -> None:
        self.terms = terms
        self.names = tuple(name for term in terms for name in term.names)
        self.modules = {name: module for term in terms for name, module in term.modules.items()}
        self._options = options
        self._border = border

    def __call__(
        self, coder: Coder, pixels: torch.Tensor, draws: StepDraws, step: int, held_out: bool = False
    ) -> Losses:
        """Compute the mean loss of pixels [B, C, H, W] in [-1, 1]. See `LossInputs` for the arguments."""
        found = reconstruct(coder, pixels, self._border, self._options, draws)
        total, logged = pixels.new_zeros(()), list[torch.Tensor]()
        for term in self.terms:
            value = term(LossInputs(coder, found, pixels, draws, step, total, held_out))
            total = total + value.loss
            logged += [each.detach().float() for each in value.logged]
        return Losses(total, torch.stack(logged))


Maker = Callable[[AutoencoderTrainingOptions, Coder, Machine], Term | None]


def _plain(name: str, option: str, measure: Callable[[Reconstruction], torch.Tensor]) -> Maker:
    """A maker of a term whose weight is an option; without weight, there is no term."""

    def make(options: AutoencoderTrainingOptions, coder: Coder, machine: Machine) -> Term | None:
        weight = getattr(options, option)
        return WeightedTerm(name, weight, measure) if weight else None

    return make


def _squared(options: AutoencoderTrainingOptions, coder: Coder, machine: Machine) -> Term:
    return WeightedTerm("squared_error", 1.0, squared_error)


def _divergence(options: AutoencoderTrainingOptions, coder: Coder, machine: Machine) -> Term | None:
    return WeightedTerm("kl", options.kl_weight, divergence) if coder.has_posterior else None


# Registered terms: name to maker(options, coder, machine), which returns None if the options do not ask for the term.
TERMS: dict[str, Maker] = {
    "squared_error": _squared,
    "kl": _divergence,
    "absolute_error": _plain("absolute_error", "l1_weight", absolute_error),
    "edge_error": _plain("edge_error", "edge_weight", edge_error),
    "imbalance": _plain("imbalance", "standardize_weight", imbalance),
}


def make_loss(options: AutoencoderTrainingOptions, coder: Coder, machine: Machine, border: int) -> AutoencoderLoss:
    """The loss that the options ask for."""
    made = (make(options, coder, machine) for make in TERMS.values())
    return AutoencoderLoss(tuple(term for term in made if term is not None), options, border)


class LossStep(nn.Module):
    """The loss as a module that holds all trained weights, so that DistributedDataParallel can wrap it."""

    def __init__(self, coder: Coder, loss: AutoencoderLoss, machine: Machine) -> None:
        super().__init__()
        self.network = coder.network
        self.others = nn.ModuleDict({name: trained.module for name, trained in loss.modules.items()})
        self._parts = (coder, loss, machine)  # in a tuple, so that their modules are not registered twice

    def forward(self, pixels: torch.Tensor, draws: StepDraws, step: int) -> Losses:
        """Compute the loss in the machine's precision."""
        coder, loss, machine = self._parts
        with machine.autocast():
            return loss(coder, pixels, draws, step)


def call_fixed(module: nn.Module, *inputs: Any) -> Any:
    """Call a module so that gradients reach its inputs, but not its parameters."""
    fixed = {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}
    return functional_call(module, fixed, inputs)
