"""The interface of all terms of the loss of autoencoder training."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.func import functional_call

from models.autoencoders.coding import Coder
from models.autoencoders.training_loss import Reconstruction
from runtime.distributed import Processes
from runtime.precision import Machine
from runtime.randomness import StepDraws
from training.autoencoder.options import AutoencoderTrainingOptions

__all__ = ["LossInputs", "LossSetup", "Term", "TermValue", "TrainedModule", "call_fixed"]


class LossSetup(NamedTuple):
    """What a term of the loss is made from.

    Args:
        options: the options of the run.
        coder: the network.
        machine: device and precision.
        side: side of the images in pixels, without their padding.
        border: width of the images' padding in pixels, which is not compared.
        processes: the processes of the run, which have equal shares of a batch.
    """

    options: AutoencoderTrainingOptions
    coder: Coder
    machine: Machine
    side: int
    border: int = 0
    processes: Processes = Processes()


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


def call_fixed(module: nn.Module, *inputs: Any) -> Any:
    """Call a module so that gradients reach its inputs, but not its parameters."""
    fixed = {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}
    return functional_call(module, fixed, inputs)
