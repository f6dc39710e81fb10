"""Claim (models/attention.py): plain matrix products beat torch's fused attention only in bfloat16, on CPUs with AMX."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks._timing import compare, markdown_table
from models.attention import attention

SHAPES = ((128, 4, 16, 48), (64, 6, 64, 64), (16, 12, 256, 64), (4, 12, 1024, 64))  # B, heads, L, width of a head


def main() -> None:
    """Time forward and backward of both on the same tensors."""
    rows = []
    for shape in SHAPES:
        query, key, value = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

        def step(function, inputs=(query, key, value)):  # type: ignore[no-untyped-def]
            return lambda: function(*inputs).sum().backward()

        seconds = compare({"ours": step(attention), "fused": step(scaled_dot_product_attention)})
        ours, fused = (1e3 * seconds[name] for name in ("ours", "fused"))
        rows.append([str(shape), f"{ours:.2f} ms", f"{fused:.2f} ms", f"{fused / ours:.2f}"])
    print(markdown_table(["B, heads, L, d", "models.attention", "torch's fused", "ratio"], rows))


if __name__ == "__main__":
    main()
