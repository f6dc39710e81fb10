"""Claim (models/unet_layers.py): compiled, norms and doubling train faster in our forms than in torch's, channels last."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from benchmarks._timing import compare, markdown_table
from models.unet_layers import GroupNorm, double
from runtime.precision import Machine, keep_freed_memory

SHAPES = ((8, 256, 16, 16), (8, 128, 32, 32), (8, 384, 32, 32))
GROUPS = 32
SIDES = ("torch", "torch, compiled", "ours, compiled")
Layer = Callable[[torch.Tensor], torch.Tensor]


def pairs(channels: int) -> dict[str, tuple[Layer, Layer]]:
    """Torch's layer and ours."""
    return {
        "group norm and SiLU": (
            nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU()),
            nn.Sequential(GroupNorm(GROUPS, channels), nn.SiLU()),
        ),
        "doubling": (lambda x: functional.interpolate(x, scale_factor=2, mode="nearest"), double),
    }


def main() -> None:
    """Time forward and backward pass, in bfloat16, of each pair; print a table."""
    keep_freed_memory()
    options, rows = Machine(torch.device("cpu"), "bf16").compiler_options, []
    for shape in SHAPES:
        x = torch.randn(shape).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
        for name, (torchs, ours) in pairs(shape[1]).items():
            torch._dynamo.reset()  # else the second shape would be compiled for all
            layers = (torchs, *(torch.compile(layer, options=options) for layer in (torchs, ours)))
            slope = torch.randn_like(torchs(x))

            def step(layer: Layer, x: torch.Tensor = x, slope: torch.Tensor = slope) -> Callable[[], object]:
                weights = list(layer.parameters()) if isinstance(layer, nn.Module) else []
                return lambda: torch.autograd.grad(layer(x), [x, *weights], slope)

            seconds = compare({side: step(layer) for side, layer in zip(SIDES, layers, strict=True)}, rounds=15)
            rows.append([name, " x ".join(map(str, shape)), *(f"{1e3 * value:.2f} ms" for value in seconds.values())])
    print(markdown_table(["layer", "shape", *SIDES], rows))


if __name__ == "__main__":
    main()
