"""Claim (runtime/precision.py): bfloat16 is faster than float32 on CPUs with AMX, and on AMD CPUs with AVX512_BF16.

On other CPUs, `--precision auto` chooses float32. With two threads, a Xeon without AMX reached 94 to 147 GFLOP/s in bfloat16
and 190 to 270 in float32. An EPYC with AVX512_BF16 reached 372 to 412 GFLOP/s in bfloat16 and 145 to 169 in float32.
"""

import torch

from benchmarks._timing import compare, markdown_table, parse_no_options
from runtime.precision import PrecisionOptions, choose_machine

SIDES = (1024, 2048, 4096)


def main() -> None:
    """Time products of square matrices in both precisions."""
    parse_no_options(__doc__)
    rows = []
    for side in SIDES:
        a, b = torch.randn(2, side, side)
        low_a, low_b = a.bfloat16(), b.bfloat16()
        seconds = compare({"fp32": lambda a=a, b=b: a @ b, "bf16": lambda a=low_a, b=low_b: a @ b})  # type: ignore[misc]
        rates = [2 * side**3 / seconds[name] / 1e9 for name in ("fp32", "bf16")]
        rows.append([str(side), *(f"{rate:.0f}" for rate in rates)])
    print(f"--precision auto: {choose_machine(PrecisionOptions('cpu')).precision}, {torch.get_num_threads()} threads")
    print(markdown_table(["side", "fp32 GFLOP/s", "bf16 GFLOP/s"], rows))


if __name__ == "__main__":
    main()
