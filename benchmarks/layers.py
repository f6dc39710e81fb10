"""Claim (runtime/cpu/kernels.py): on a CPU, our compiled layers train faster than torch's compiled layers."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks._timing import compare, markdown_table, parse_no_options
from runtime.cpu.kernels import with_cpu_kernels
from runtime.precision import Machine, keep_freed_memory

IMAGES = ((8, 256, 16, 16), (8, 128, 32, 32), (8, 384, 32, 32))  # channels last
TOKENS = ((256, 16, 128), (16, 256, 384), (16, 256, 768))
GROUPS = 32
SIDES = ("torch", "torch, compiled", "ours, compiled")
Layer = Callable[[torch.Tensor], torch.Tensor]


def cases() -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    """Yield a name, an input and torch's layer."""
    for shape in IMAGES:
        x, channels = torch.randn(shape).bfloat16().to(memory_format=torch.channels_last), shape[1]
        yield "group norm and SiLU", x, nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU())
        yield "nearest upsampling", x, nn.Upsample(scale_factor=2, mode="nearest")
    for shape in TOKENS:
        x, width = torch.randn(shape).bfloat16(), shape[2]
        mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        yield "GELU", x.repeat(1, 1, 4), nn.GELU("tanh")
        yield "linear layers around GELU", x, mlp


def main() -> None:
    """Time forward and backward passes of each layer in bfloat16, and print a table."""
    parse_no_options(__doc__)
    keep_freed_memory()
    machine, rows = Machine(torch.device("cpu"), "bf16"), []
    for name, x, torchs in cases():
        x.requires_grad_()
        ours = with_cpu_kernels(copy.deepcopy(torchs))
        torch._dynamo.reset()  # The second shape would otherwise trigger compilation with dynamic shapes.
        layers = (torchs, *(torch.compile(layer, options=machine.compiler_options) for layer in (torchs, ours)))

        def step(layer: Layer, x: torch.Tensor = x) -> Callable[[], object]:
            weights = list(layer.parameters()) if isinstance(layer, nn.Module) else []
            with machine.autocast():
                slope = torch.randn_like(layer(x))

            def run() -> object:
                with machine.autocast():
                    value = layer(x)
                return torch.autograd.grad(value, [x, *weights], slope)

            return run

        seconds = compare({side: step(layer) for side, layer in zip(SIDES, layers, strict=True)}, rounds=15)
        rows.append([name, " x ".join(map(str, x.shape)), *(f"{1e3 * value:.2f} ms" for value in seconds.values())])
    print(markdown_table(["layer", "input", *SIDES], rows))


if __name__ == "__main__":
    main()
