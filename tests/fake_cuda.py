"""A CUDA device without a GPU: fake tensors that have a shape, a dtype and the device `cuda`, but no values.

Mixing devices or dtypes raises the error that a GPU raises. Reading a value (`.item()`, a boolean mask, `if tensor:`) raises
torch's DataDependentOutputException or DynamicOutputShapeException. A copy for which the host waits raises `HostWaitsError`
within `FakeCuda.forbid_waiting`.

torch's builds for CUDA cannot run autograd's engine without a driver, so a short engine in Python takes its place.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.proxy_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CUDA", "READS_A_VALUE", "FakeCuda", "HostWaitsError", "Products", "outside", "pretend_cuda"]

CUDA = torch.device("cuda", 0)
PRODUCTS, ATTENTION = (
    ("mm", "addmm", "bmm", "baddbmm", "conv2d", "convolution", "linear", "matmul"),
    "_scaled_dot_product",
)
READS_A_VALUE = (DataDependentOutputException, DynamicOutputShapeException)
outside = unset_fake_temporarily  # with outside(): tensors have values


class HostWaitsError(Exception):
    """The host waits for a copy to or from the device."""


class FakeCuda(FakeTensorMode):
    """Within this mode, tensors have no values; real tensors that enter it lose theirs."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeCuda":
        return self  # copies of tensors stay in the same mode

    @contextmanager
    def forbid_waiting(self) -> Iterator[None]:
        """Raise `HostWaitsError` where the host would wait for the device."""
        with _Watch():
            yield


class Products(TorchDispatchMode):
    """Records the dtypes of matrix products, convolutions and attention, and refuses products of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith((*PRODUCTS, ATTENTION)):
            dtypes = {each.dtype for each in args if isinstance(each, torch.Tensor)}
            if len(dtypes) > 1 and not name.startswith(ATTENTION):  # whose sums are saved in float32
                raise RuntimeError(f"expected the factors of {func} to have the same dtype, but got {dtypes}")
            self.dtypes.add(args[0].dtype)
        return func(*args, **kwargs or {})


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_to_copy":
            _check_copy(args[0], result, kwargs.get("non_blocking", False))
        elif name == "copy_":
            _check_copy(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif name in ("index", "index_put_", "index_put"):
            for index in args[1]:
                if index is not None:
                    _check_copy(index, args[0], False)
        return result


def _check_copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
    """A copy to the device is free to wait for if it does not block; the value of a copy to the host is always waited for."""
    types = source.device.type, target.device.type
    if types[0] != types[1] and (types[1] == "cpu" or not non_blocking):
        raise HostWaitsError(f"a copy of {tuple(source.shape)} from {types[0]} to {types[1]}")


class _Generator(torch.Generator):
    """A generator that claims a device."""

    def __new__(cls, device: torch.device | str = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.claimed = torch.device(device).type


class _CheckGenerators(TorchFunctionMode):
    """Refuse to draw numbers on one device with another device's generator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        generator = kwargs.get("generator")
        drawn = isinstance(generator, _Generator) and isinstance(result, torch.Tensor)
        if drawn and result.device.type != generator.claimed:
            raise RuntimeError(
                f"Expected a '{result.device.type}' device type for generator but found '{generator.claimed}'"
            )
        return result


def _apply(module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, with new parameters: torch swaps a fake tensor's content, which references to it prevent."""
    for child in module.children():
        _apply(child, convert)
    for store in (module._parameters, module._buffers):
        for name, tensor in store.items():
            if tensor is not None:
                with torch.no_grad():
                    moved = convert(tensor)
                if isinstance(tensor, nn.Parameter):
                    moved = nn.Parameter(moved, tensor.requires_grad)
                store[name] = moved
    return module


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The kernels that torch chooses on a GPU: FlashAttention in 16 bits, else the memory-efficient one."""
    if query.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, query.requires_grad)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


# Autograd's engine


def _differentiate(
    outputs: Sequence[torch.Tensor], slopes: Sequence[torch.Tensor | None], receive: Callable[[torch.Tensor, Any], None]
) -> None:
    """Run the backward pass; `receive` gets the leaves and their gradients."""
    roots = [output.grad_fn for output in outputs]
    waits_for: dict[Any, int] = defaultdict(int)
    pending, seen = list(dict.fromkeys(roots)), set(roots)
    for node in pending:
        for following, _ in node.next_functions:
            if following is not None:
                waits_for[following] += 1
                if following not in seen:
                    seen.add(following)
                    pending.append(following)
    given: dict[Any, dict[int, torch.Tensor]] = defaultdict(dict)
    for output, slope in zip(outputs, slopes, strict=True):
        given[output.grad_fn][output.output_nr] = torch.ones_like(output) if slope is None else slope
    ready = [node for node in dict.fromkeys(roots) if not waits_for[node]]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            gradients = _arriving(node, given.pop(node, {}))
            if hasattr(node, "variable"):
                if gradients[0] is not None:
                    receive(node.variable, gradients[0])
                continue
            computed: Any = node(*gradients) if any(each is not None for each in gradients) else None
            computed = computed if isinstance(computed, tuple) else (computed,) * len(node.next_functions)
            for (following, number), gradient in zip(node.next_functions, computed, strict=True):
                if following is None:
                    continue
                if gradient is not None:
                    before = given[following].get(number)
                    given[following][number] = gradient if before is None else before + gradient
                waits_for[following] -= 1
                if not waits_for[following]:
                    ready.append(following)


def _arriving(node: Any, gradients: dict[int, torch.Tensor]) -> list[torch.Tensor | None]:
    """The gradients of a node's outputs, checked and cast as autograd's engine does."""
    arranged: list[torch.Tensor | None] = []
    for number, expected in enumerate(node._input_metadata):
        gradient = gradients.get(number)
        if gradient is not None:
            if gradient.device != expected.device:
                raise RuntimeError(f"{node.name()}: a gradient on {gradient.device}, but expected {expected.device}")
            if gradient.shape != torch.Size(expected.shape):
                gradient = gradient.sum_to_size(expected.shape)  # raises if the shapes do not broadcast
            gradient = gradient.to(expected.dtype)
        arranged.append(gradient)
    return arranged


def _backward(loss: torch.Tensor, gradient: torch.Tensor | None = None, **others: Any) -> None:
    def accumulate(leaf: torch.Tensor, slope: torch.Tensor) -> None:
        leaf.grad = slope.detach() if leaf.grad is None else leaf.grad + slope

    _differentiate([loss], [gradient], accumulate)


def _grad(
    outputs: Any, inputs: torch.Tensor, grad_outputs: torch.Tensor | None = None, **others: Any
) -> tuple[torch.Tensor, ...]:
    found: list[torch.Tensor] = []
    _differentiate([outputs], [grad_outputs], lambda leaf, slope: found.append(slope) if leaf is inputs else None)
    (slope,) = found
    return (slope,)


@contextmanager
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Run the block on a fake GPU that supports bfloat16."""
    monkeypatch.setattr(nn.Module, "_apply", _apply)
    monkeypatch.setattr(torch.Tensor, "backward", _backward)
    monkeypatch.setattr(torch.autograd, "grad", _grad)
    monkeypatch.setattr(
        torch._C, "_current_graph_task_id", lambda: 0
    )  # gradient checkpointing recomputes once per task
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", _attention)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor)
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeCuda() as mode, _CheckGenerators():
        yield mode
