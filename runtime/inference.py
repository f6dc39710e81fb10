"""A network made ready for evaluation alone: weights kept as they are used, one compiled graph for all batch sizes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from runtime.cpu_kernels import with_cpu_kernels
from runtime.precision import Machine

__all__ = ["compile_for_batches", "for_sampling", "hold_weights"]

# Layers whose inputs and weights autocast casts when they are called, and whose weights nothing else uses.
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def for_sampling(network: nn.Module, machine: Machine) -> Callable[..., torch.Tensor]:
    """The network as a sampler calls it; it must not be trained, averaged or saved any more."""
    held = with_cpu_kernels(hold_weights(network, machine))
    return compile_for_batches(held, machine) if machine.compile else held


def hold_weights(network: nn.Module, machine: Machine) -> nn.Module:
    """Store weights, in place, in the precision to which autocast would cast them at every evaluation; returns `network`.

    Autocast remembers its casts of trained weights alone. Under this machine's autocast, results keep their bits; the
    network must not be trained, averaged or saved any more. Layers that cast their weights themselves stay as they are.
    """
    device = machine.device.type
    with machine.autocast():
        if not torch.is_autocast_enabled(device):
            return network
        dtype = torch.get_autocast_dtype(device)
    for layer in network.modules():
        if isinstance(layer, CAST) and not any(weight.requires_grad for weight in layer.parameters(recurse=False)):
            layer.to(dtype)
    return network


def compile_for_batches(network: nn.Module, machine: Machine) -> Callable[..., torch.Tensor]:
    """network(t, x, condition), compiled once for all batch sizes above 1.

    Samplers have several: the last batch is smaller, guidance within an interval doubles some. Each would be compiled
    anew, at a cost of some ten seconds.
    """
    torch._functorch.config.donated_buffer = False  # an exact trace goes back through one graph several times
    compiled = torch.compile(with_cpu_kernels(network), options=machine.compiler_options)

    def evaluate(t: torch.Tensor, x: torch.Tensor, condition: Any) -> torch.Tensor:
        for tensor in (t, x, *condition):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(t, x, condition)

    return evaluate
