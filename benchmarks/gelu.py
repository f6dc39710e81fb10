"""Claim (models/dit.py): compiled, GELU's tanh approximation is faster through the logistic function than through tanh."""

import torch
from torch.nn import functional

from benchmarks._timing import compare, markdown_table
from models.dit import Gelu

SHAPES = ((4096, 1536), (4096, 3072), (2048, 512))  # tokens, hidden width


def main() -> None:
    """Time forward and backward pass of both, compiled and not, and compare their values."""
    sides = {
        "tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "tanh, compiled": torch.compile(lambda x: functional.gelu(x, approximate="tanh")),
        "ours, compiled": torch.compile(Gelu()),
    }
    rows = []
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        slope = torch.randn(shape, dtype=torch.bfloat16)

        def step(function, x=x, slope=slope):  # type: ignore[no-untyped-def]
            return lambda: function(x).backward(slope)

        seconds = compare({name: step(function) for name, function in sides.items()})
        wide = x.detach().float()
        error = (sides["ours, compiled"](wide) - sides["tanh"](wide)).abs().max()
        rows.append([str(shape), *(f"{1e3 * value:.1f} ms" for value in seconds.values()), f"{error:.1e}"])
    print(markdown_table(["tokens, width", *sides, "largest difference in float32"], rows))


if __name__ == "__main__":
    main()
