"""The training loss as a sum of terms. A new term is one entry of TERMS.

A term may bring modules of its own, such as a discriminator, each with its own optimizer. Their state is saved with the
network's. One backward pass computes all gradients, so a term that trains a module adds the module's own loss to its value,
and keeps the two losses apart: `call_fixed` gives no gradient to the module, and `detach()` none to the network. A term may
also add only one of them, depending on the step, which alternates: weights without a gradient are not updated.

The reconstruction's terms come first, because the terms with an adaptive weight compare their gradient with the sum so far.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

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
from training.autoencoder.terms.adversarial import make_adversarial
from training.autoencoder.terms.alignment import make_alignment
from training.autoencoder.terms.perceptual import make_perceptual
from training.autoencoder.terms.protocol import LossInputs, LossSetup, Term, TermValue, TrainedModule

__all__ = ["TERMS", "AutoencoderLoss", "LossStep", "Losses", "WeightedTerm", "make_loss"]


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


Maker = Callable[[LossSetup], Term | None]


def _plain(name: str, option: str, measure: Callable[[Reconstruction], torch.Tensor]) -> Maker:
    """A maker of a term whose weight is an option; without weight, there is no term."""

    def make(setup: LossSetup) -> Term | None:
        weight = getattr(setup.options, option)
        return WeightedTerm(name, weight, measure) if weight else None

    return make


def _squared(setup: LossSetup) -> Term:
    """The squared error, which is logged even without weight."""
    return WeightedTerm("squared_error", setup.options.l2_weight, squared_error)


def _divergence(setup: LossSetup) -> Term | None:
    return WeightedTerm("kl", setup.options.kl_weight, divergence) if setup.coder.has_posterior else None


# Registered terms: name to a maker, which returns None if the options do not ask for the term.
TERMS: dict[str, Maker] = {
    "squared_error": _squared,
    "absolute_error": _plain("absolute_error", "l1_weight", absolute_error),
    "edge_error": _plain("edge_error", "edge_weight", edge_error),
    "perceptual": make_perceptual,
    "alignment": make_alignment,
    "adversarial": make_adversarial,
    "kl": _divergence,
    "imbalance": _plain("imbalance", "standardize_weight", imbalance),
}


def make_loss(setup: LossSetup) -> AutoencoderLoss:
    """The loss that the options ask for. Raises the errors of the terms' makers."""
    made = (make(setup) for make in TERMS.values())
    return AutoencoderLoss(tuple(term for term in made if term is not None), setup.options, setup.border)


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
