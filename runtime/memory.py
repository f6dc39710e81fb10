"""Memory of a training step, estimated before the first one.

Weights, gradients, optimizer state and EMA follow from the parameters. Activations are measured: a forward pass on fake
tensors, which have shapes but no values, lists the tensors that autograd saves for the backward pass. Compiled networks save
less, so the estimate is an upper bound. It does not include workspaces of libraries and fragmentation, for which MARGIN
leaves room.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["Activations", "StepMemory", "advise", "describe_free", "free_memory", "measure_activations"]

MARGIN = 0.9  # share of the free memory that the estimate may use

Network = Callable[..., torch.Tensor]


class Activations(NamedTuple):
    """Bytes that autograd saves in a forward pass: `constant` plus `per_image` for each image."""

    constant: float
    per_image: float


class StepMemory(NamedTuple):
    """Estimated bytes of a training step in each process, for `images` at once."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: Activations
    images: int

    @property
    def fixed(self) -> float:
        """Bytes that do not depend on the number of images."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations.constant

    @property
    def total(self) -> float:
        """All bytes."""
        return self.fixed + self.activations.per_image * self.images

    def largest(self, free: float) -> int:
        """The number of images at once that fit into `free` bytes."""
        return max(0, int((MARGIN * free - self.fixed) / self.activations.per_image))

    def describe(self) -> str:
        """The parts on one line."""
        saved = self.total - self.fixed + self.activations.constant
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "EMA": self.average,
            f"activations of {self.images} images": saved,
        }
        return f"about {_gigabytes(self.total)} GB: " + ", ".join(f"{n} {_gigabytes(b)}" for n, b in parts.items())


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of a GPU; None for a CPU, or if torch cannot tell."""
    report = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    return None if report is None else report(device)


def describe_free(free: float, total: float) -> str:
    """A device's free and total memory in words."""
    return f"{_gigabytes(free)} of {_gigabytes(total)} GB are free"


def advise(needed: StepMemory, free: float, batch_size: int, checkpointing: bool) -> str | None:
    """Advice for a step that does not fit into `free` bytes; None if it fits.

    Args:
        needed: the step's memory.
        free: the device's free bytes.
        batch_size: images per process and step.
        checkpointing: whether gradient checkpointing is on.
    """
    largest = needed.largest(free)
    if needed.images <= largest:
        return None
    ways = [] if checkpointing else ["--use_grad_checkpointing"]
    if largest:
        parts = next(
            count for count in range(1, batch_size + 1) if not batch_size % count and batch_size // count <= largest
        )
        ways = [f"--grad_accumulation {parts}", f"--batch_size {largest}", *ways]
    else:
        ways += ["--fsdp with several processes", "a smaller network"]
    return (
        f"the training step is estimated to need {_gigabytes(needed.total)} GB, but the device has {_gigabytes(free)} GB free: "
        f"use {', '.join(ways[:-1])}{' or ' if ways[1:] else ''}{ways[-1]}"
    )


def measure_activations(
    network: nn.Module, loss: Callable[[Network, int], torch.Tensor], device: torch.device
) -> Activations:
    """Measure what a forward pass in training would save on `device`, without running it.

    Args:
        network: any module, on any device. With gradient checkpointing, the largest block's tensors count too, because the
            backward pass recomputes one block at a time.
        loss: loss(network, n) is the loss of n images on `device`, whose values have no meaning.
        device: the device of the training step.
    """
    few, more = (_saved(network, loss, device, count) for count in (2, 4))
    per_image = (more - few) / 2
    return Activations(few - 2 * per_image, per_image)


def _saved(network: nn.Module, loss: Callable[[Network, int], torch.Tensor], device: torch.device, count: int) -> float:
    """Bytes saved for `count` images."""
    whole, _ = _pass(network, loss, device, count)
    if not any(getattr(getattr(m, "options", None), "use_grad_checkpointing", False) for m in network.modules()):
        return whole
    training = network.training
    try:  # in evaluation mode, networks do not checkpoint
        return whole + _pass(network.eval(), loss, device, count)[1]
    finally:
        network.train(training)


def _pass(
    network: nn.Module, loss: Callable[[Network, int], torch.Tensor], device: torch.device, count: int
) -> tuple[float, float]:
    """Bytes saved in one forward pass, and in the block that saves most."""
    with FakeTensorMode(), _GpuAttention(), torch.enable_grad():
        own = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            for name, value in [*network.named_parameters(), *network.named_buffers()]
        }
        for name, parameter in network.named_parameters():
            own[name].requires_grad_(parameter.requires_grad)
        saved = _Saved(own)
        handles = [handle for block in _blocks(network) for handle in saved.watch(block)]
        try:
            with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
                loss(lambda *arguments: functional_call(network, own, arguments), count)
        finally:
            for handle in handles:
                handle.remove()
    return sum(saved.sizes.values()), max(saved.by_block.values(), default=0.0)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The entries of the network's module lists and dictionaries."""
    containers = [module for module in network.modules() if isinstance(module, nn.ModuleList | nn.ModuleDict)]
    return [block for container in containers for block in container.children()]


class _Saved:
    """The storages that autograd saves, except the `own` tensors'."""

    def __init__(self, own: dict[str, torch.Tensor]) -> None:
        self._known = {_key(tensor) for tensor in own.values()}
        self._kept: list[torch.Tensor] = []  # so that no key is used again
        self._block = -1
        self.sizes: dict[int, float] = {}
        self.by_block: dict[int, float] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a saved tensor's storage once."""
        key = _key(tensor)
        if key not in self._known:
            self._known.add(key)
            self._kept.append(tensor)
            self.sizes[key] = tensor.untyped_storage().nbytes()
            self.by_block[self._block] = self.by_block.get(self._block, 0.0) + self.sizes[key]
        return tensor

    def watch(self, block: nn.Module) -> list[Any]:
        """Attribute what is saved during calls of `block` to it. Returns the handles of the hooks."""

        def enter(*_: object) -> None:
            self._block = id(block)

        def leave(*_: object) -> None:
            self._block = -1

        return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _GpuAttention(TorchFunctionMode):
    """Attention by the kernels that torch chooses on GPUs, which save no matrix of all pairs of tokens."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention and len(args) == 3 and args[0].device.type != "cpu":
            if args[0].dtype == torch.float32:
                return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"
