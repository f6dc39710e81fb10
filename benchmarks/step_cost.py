"""Measures how a training step's time, FLOP/s and activation memory grow with batch size, tokens and parameters.

    python -m benchmarks.step_cost [--rounds 3] [--output docs/lab-notes/step_cost.png]

Times `TrainingState.advance` in bfloat16 without compilation. The starting point is DiT-S/2 with batches of 8 latents,
32 x 32 x 4 each; one quantity varies at a time. Activation memory is counted as in benchmarks/memory.py: the tensors that
autograd saves in the forward pass.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks._timing import compare, markdown_table
from benchmarks.memory import BF16, OPTIONS, theory_of
from benchmarks.training_step import DECAY, OBJECTIVE, RATE, Case, forward_operations, new_batch, new_network
from runtime.precision import keep_freed_memory
from training.optimizers import OptimizerOptions
from training.state import TrainingState

BATCH, SIDE, NETWORK = 8, 32, "DiT-S/2"
VARIED = {
    "batch": [Case(NETWORK, SIDE, batch, OPTIONS) for batch in (2, 4, 8, 16, 32)],
    "tokens": [Case(NETWORK, side, BATCH, OPTIONS) for side in (8, 16, 32, 64)],
    "parameters": [Case(f"DiT-{size}/2", SIDE, BATCH, OPTIONS) for size in ("Mi", "Ti", "S", "B")],
}


class Cost(NamedTuple):
    """The cost of a step.

    Attributes:
        value: the varied quantity.
        seconds: time per step.
        rate: operations per second.
        activations: bytes of activations.
    """

    value: float
    seconds: float
    rate: float
    activations: float


def cost_of(case: Case, varied: str, rounds: int) -> Cost:
    """Measure a training step."""
    network, batch = new_network(case), new_batch(case)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    value = {"batch": case.batch_size, "tokens": (case.size // 2) ** 2, "parameters": parameters}[varied]
    state = TrainingState(network, BF16, DECAY, OptimizerOptions(lr=RATE))
    step = partial(state.advance, network, OBJECTIVE, batch, RATE, 0.0)
    seconds = compare({"step": step}, rounds)["step"]
    return Cost(value, seconds, 3 * forward_operations(case) / seconds, theory_of(case)["activations"])


def draw_picture(costs: dict[str, list[Cost]], path: Path) -> None:
    """Plot seconds and activations against the varied quantity on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(costs), figsize=(9, 3), layout="constrained")
    for axis, (name, entries) in zip(axes, costs.items(), strict=True):
        values = [cost.value for cost in entries]
        axis.loglog(values, [cost.seconds for cost in entries], "o-", label="seconds per step")
        axis.loglog(values, [cost.activations / 1e9 for cost in entries], "s--", label="GB of activations")
        axis.minorticks_off()
        axis.set_xticks(values, [f"{value / 1e6:.3g} M" if value > 1e6 else f"{value:g}" for value in values])
        axis.set_xlabel(name)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print a table and plot it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps; default: 3")
    parser.add_argument("--output", type=Path, default=Path("docs/lab-notes/step_cost.png"), help="picture to write")
    options = parser.parse_args()
    keep_freed_memory()
    costs, rows = {}, []
    for varied, cases in VARIED.items():
        costs[varied] = [cost_of(case, varied, options.rounds) for case in cases]
        for case, cost in zip(cases, costs[varied], strict=True):
            row = [varied, case.model_type, str(case.batch_size), f"{(case.size // 2) ** 2}"]
            row += [f"{1e3 * cost.seconds:.0f} ms", f"{cost.rate / 1e9:.0f}", f"{cost.activations / 1e9:.2f} GB"]
            rows.append(row)
            print(row, flush=True)
    header = ["varied", "network", "batch", "tokens", "step", "GFLOP/s", "activations"]
    print(f"\n{torch.get_num_threads()} threads\n\n{markdown_table(header, rows)}")
    draw_picture(costs, options.output)


if __name__ == "__main__":
    main()
