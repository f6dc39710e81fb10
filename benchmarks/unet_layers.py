"""Claim (models/unet_layers.py): compiled, norms and doubling train faster in our forms than in torch's, channels last."""

import torch
from torch import nn
from torch.nn import functional

from benchmarks._timing import compare, markdown_table
from models.unet_layers import GroupNorm, double
from runtime.precision import COMPILER, keep_freed_memory

SHAPES = ((8, 256, 16, 16), (8, 128, 32, 32), (8, 384, 32, 32))
GROUPS = 32


def main() -> None:
    """Time forward and backward pass, in bfloat16, of each pair."""
    keep_freed_memory()
    rows = []
    for shape in SHAPES:
        x = torch.randn(shape).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
        pairs = {
            "group norm and SiLU": (
                nn.Sequential(nn.GroupNorm(GROUPS, shape[1]), nn.SiLU()),
                nn.Sequential(GroupNorm(GROUPS, shape[1]), nn.SiLU()),
            ),
            "doubling": (lambda x: functional.interpolate(x, scale_factor=2, mode="nearest"), double),
        }
        for name, (torchs, ours) in pairs.items():
            sides = {
                "torch": torchs,
                "torch, compiled": torch.compile(torchs, options=COMPILER),
                "ours, compiled": torch.compile(ours, options=COMPILER),
            }
            slope = torch.randn_like(torchs(x))

            def step(function, x=x, slope=slope):  # type: ignore[no-untyped-def]
                return lambda: function(x).backward(slope)

            seconds = compare({side: step(function) for side, function in sides.items()}, rounds=15)
            rows.append([name, str(shape), *(f"{1e3 * value:.2f} ms" for value in seconds.values())])
    print(markdown_table(["layer", "shape", *sides], rows))


if __name__ == "__main__":
    main()
