"""One network trained by several processes: replicated in each of them, or shared out among them.

Replicated: DistributedDataParallel averages the gradients. Shared out: FSDP2 (`torch.distributed.fsdp.fully_shard`) keeps
1 / N of every weight, gradient and optimizer state in each process and gathers a block's weights just before it is used.
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


def replicate(network: nn.Module, processes: Processes) -> nn.Module:
    """The network in every process, with gradients averaged over all; the network itself where there is one process."""
    if processes.count == 1:
        return network
    return DistributedDataParallel(network, gradient_as_bucket_view=True)


def shard(network: nn.Module, device: torch.device, processes: Processes) -> None:
    """Leave 1 / N of every parameter in each process, on `device`, in place; the network is called as before.

    Blocks, the entries of its lists and dictionaries of modules, are gathered one at a time, the rest together. Weights that
    lay channels last do so no more, since FSDP2 refuses them.
    """
    network.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(device.type, (processes.count,))
    containers = [module for module in network.modules() if isinstance(module, nn.ModuleList | nn.ModuleDict)]
    for block in (block for container in containers for block in container.children()):
        if next(block.parameters(), None) is not None:
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    network.to(device)  # what is no parameter


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was called with the network."""
    return isinstance(network, FSDPModule)


def reshard(network: nn.Module) -> None:
    """Drop the weights that a network holds gathered since its forward pass, before those that are shared out change."""
    if is_sharded(network):
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def local_gradients(network: nn.Module) -> Iterator[None]:
    """Backward passes inside add to this process's gradients alone; the next one after it exchanges them all."""
    network = getattr(network, "_orig_mod", network)  # what torch.compile has wrapped
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
    """The whole of a tensor that may be shared out, on its device; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, in place; all of it where it is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_state(value: Any, keep: bool = True) -> Any:
    """`value`, where dictionaries and lists may hold tensors that are shared out: they come as whole ones on the CPU.

    Every process must call it; one that does not `keep` the result gets empty tensors, and saves the memory.
    """
    if isinstance(value, DTensor):
        gathered = gather_dtensor(value)
        return gathered.cpu() if keep else gathered.new_empty(0)
    if isinstance(value, dict):
        return {key: gather_state(item, keep) for key, item in value.items()}
    return [gather_state(item, keep) for item in value] if isinstance(value, list) else value


def arranged_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """The whole `tensor`, shared out and ordered in memory as `model` is; as it is if their shapes differ."""
    if tensor.shape != model.shape:
        return tensor
    if isinstance(model, DTensor):
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
    return torch.empty_like(model, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
