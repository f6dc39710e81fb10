"""Prepare a network for evaluation only: weights stored in the precision used, one compiled graph for all batch sizes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from runtime.cpu.kernels import with_cpu_kernels
from runtime.precision import Machine

__all__ = ["compile_for_batches", "for_sampling", "hold_weights"]

# Layers whose inputs and weights autocast casts at every call, and whose weights nothing else uses.
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def for_sampling(network: nn.Module, machine: Machine) -> Callable[..., torch.Tensor]:
    """Prepare a network for sampling; it must not be trained, averaged or saved afterwards."""
    held = with_cpu_kernels(hold_weights(network, machine))
    return compile_for_batches(held, machine) if machine.compile else held


def hold_weights(network: nn.Module, machine: Machine) -> nn.Module:
    """Store weights, in place, in the precision to which autocast would cast them at every evaluation; returns `network`.

    Autocast caches its casts only for weights that require gradients. Under this machine's autocast, results are
    bit-identical. The network must not be trained, averaged or saved afterwards. Layers that cast their own weights are
    left unchanged.
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
    """Compile network(t, x, condition) once for all batch sizes above 1.

    Samplers use several batch sizes: the last batch is smaller, and guidance within an interval doubles some batches.
    Compiling for each size would take about ten seconds each time.
    """
    torch._functorch.config.donated_buffer = False  # an exact trace backpropagates through one graph several times
    compiled = torch.compile(with_cpu_kernels(network), options=machine.compiler_options)

    def evaluate(t: torch.Tensor, x: torch.Tensor, condition: Any, **others: Any) -> torch.Tensor:
        for tensor in (t, x, *condition, *others.values()):
            if isinstance(tensor, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(t, x, condition, **others)

    return evaluate
