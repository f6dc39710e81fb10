"""A network made ready for evaluation alone: weights kept as they are used, one compiled graph for all batch sizes."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from runtime.precision import Machine

__all__ = ["compile_for_batches", "hold_weights", "keep_freed_memory"]

# Layers whose inputs and weights autocast casts when they are called, and whose weights nothing else uses.
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 2**31 - 1  # that mallopt can be told


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


def compile_for_batches(network: nn.Module) -> Callable[..., torch.Tensor]:
    """network(t, x, condition), compiled once for all batch sizes above 1.

    Samplers have several: the last batch is smaller, guidance within an interval doubles some. Each would be compiled
    anew, at a cost of some ten seconds.
    """
    compiled = torch.compile(network)

    def evaluate(t: torch.Tensor, x: torch.Tensor, condition: Any) -> torch.Tensor:
        for tensor in (t, x, *condition):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(t, x, condition)

    return evaluate


def keep_freed_memory(below: int = LARGEST) -> bool:
    """Let the C library keep freed blocks of fewer bytes than `below` for the next tensors; whether it was told so.

    glibc by itself hands blocks above 32 MiB back to the system at once, which must then fill every page with zeros anew at
    the next operation. Other C libraries are left as they are.
    """
    try:
        library = ctypes.CDLL(None)
        told = [library.mallopt(name, below) for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)]
    except (AttributeError, OSError, TypeError):
        return False
    return all(told)
