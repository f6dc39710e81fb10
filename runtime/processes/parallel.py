"""Train one network in several processes, replicated or sharded.

Replicated: DistributedDataParallel averages the gradients. Sharded: FSDP2 (`torch.distributed.fsdp.fully_shard`) keeps
1 / N of every weight, gradient and optimizer state in each process, and gathers a block's weights just before their use.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from runtime.distributed import Processes

__all__ = [
    "arranged_like",
    "gather_dtensor",
    "gather_state",
    "is_sharded",
    "local_gradients",
    "local_shard",
    "replicate",
    "reshard",
    "shard",
]


def replicate(network: nn.Module, processes: Processes, partly_used: bool = False) -> nn.Module:
    """Wrap a network so that its gradients are averaged over all processes; with one process, return it unchanged.

    `partly_used` says that some steps may leave parameters without a gradient, which costs a walk through each step's graph.
    """
    if processes.count == 1:
        return network
    return DistributedDataParallel(network, gradient_as_bucket_view=True, find_unused_parameters=partly_used)


def shard(network: nn.Module, device: torch.device, processes: Processes) -> None:
    """Shard every parameter in place, leaving 1 / N in each process, on `device`; the network is called as before.

    Blocks (the entries of the network's module lists and dictionaries) are gathered one at a time, and the rest together.
    Channels-last weights become contiguous, because FSDP2 does not support them.
    """
    network.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(device.type, (processes.count,))
    containers = [module for module in network.modules() if isinstance(module, nn.ModuleList | nn.ModuleDict)]
    for block in (block for container in containers for block in container.children()):
        if next(block.parameters(), None) is not None:
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    network.to(device)  # the buffers


def is_sharded(network: nn.Module) -> bool:
    """Whether the network was sharded with `shard`."""
    return isinstance(network, FSDPModule)


def reshard(network: nn.Module) -> None:
    """Free the weights gathered in the forward pass; required before the sharded weights change."""
    if is_sharded(network):
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def local_gradients(network: nn.Module) -> Iterator[None]:
    """Accumulate gradients in this process only during the block; the next backward pass after it synchronizes them."""
    network = getattr(network, "_orig_mod", network)  # the network inside torch.compile's wrapper
    if isinstance(network, DistributedDataParallel):
        with network.no_sync():
            yield
    elif isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(False)
        yield
        network.set_requires_gradient_sync(True)
    else:
        yield


def gather_dtensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that may be sharded, on its device; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, without a copy; the whole tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_state(value: Any, keep: bool = True) -> Any:
    """Gather the sharded tensors in nested dictionaries and lists to the CPU.

    Every process must call this. A process that does not `keep` the result gets empty tensors, which saves memory.
    """
    if isinstance(value, DTensor):
        gathered = gather_dtensor(value)
        return gathered.cpu() if keep else gathered.new_empty(0)
    if isinstance(value, dict):
        return {key: gather_state(item, keep) for key, item in value.items()}
    return [gather_state(item, keep) for item in value] if isinstance(value, list) else value


def arranged_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Give a full tensor the sharding and memory layout of `model`; returns it unchanged if their shapes differ."""
    if tensor.shape != model.shape:
        return tensor
    if isinstance(model, DTensor):
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
    return torch.empty_like(model, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
