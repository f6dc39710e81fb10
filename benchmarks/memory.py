"""Claim: a training step uses at most a quarter more memory than theory requires.

    python -m benchmarks.memory [--network DiT-L/2] [--batch_size 4] [--output docs/memory.png]

Each row runs in a separate process, which takes two steps of `TrainingState.advance` in bfloat16 on random 32 x 32 x 4
latents. It reports its peak resident memory minus the memory in use after its imports. The first two rows keep freed memory,
as training on a CPU does. The others are eager and return freed memory, to show how much the optimizer and the EMA use.

Theory is the sum of two parts:
- 20 bytes per parameter: weight, gradient, AdamW's two state tensors and EMA.
- Activations: all tensors that autograd saves in the forward pass, counting each storage once, without weights and their
  casts. With gradient checkpointing, these are the blocks' inputs, tensors saved outside the blocks, and one block's tensors.

Linux only, where ru_maxrss counts KiB.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks._timing import markdown_table
from benchmarks.training_step import DECAY, OBJECTIVE, RATE, Case, new_batch, new_network, stack
from models.dit import DiTOptions
from runtime.precision import Machine, keep_freed_memory
from training.optimizers import OptimizerOptions
from training.state import TrainingState

BYTES_PER_PARAMETER = 20  # float32 weight, gradient, two AdamW state tensors and EMA
MAX_RATIO = 1.25
BF16 = Machine(torch.device("cpu"), "bf16")
OPTIONS = DiTOptions(num_classes=10)
CASTS_AND_VIEWS = {  # autograd nodes between a weight and the tensor saved for it
    "ToCopyBackward0",
    "TBackward0",
    "ViewBackward0",
    "TransposeBackward0",
}


class StackingEma:
    """EMA as in LFM's published code: one vector of all parameters, which are concatenated again at every step."""

    def __init__(self, network: nn.Module) -> None:
        self.stacked = stack(network.parameters())

    def update(self, network: nn.Module, keep: torch.Tensor) -> None:
        """Update the EMA with the network's current parameters."""
        self.stacked.mul_(DECAY).add_(stack(network.parameters()), alpha=1 - DECAY)


class ForeachAdamW(torch.optim.AdamW):
    """AdamW with `foreach`, which allocates temporaries for all parameters. It never skips a step."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Take a step without `found_inf`, which only the fused implementation accepts."""
        self.found_inf = None
        return super().step(closure)


def with_foreach(state: TrainingState) -> None:
    """Replace the optimizer with AdamW that allocates temporaries."""
    group = {"params": state.parameters, "relative_lr": 1.0}
    state.optimizers = [ForeachAdamW([group], weight_decay=0.0, foreach=True)]


def with_stacking(state: TrainingState) -> None:
    """Replace the in-place EMA with `StackingEma`."""
    del state.ema
    state.ema = StackingEma(state.network)  # type: ignore[assignment]


class Row(NamedTuple):
    """How to take a step. `change` modifies the training state before the first one."""

    checkpointing: bool = False
    keeps_memory: bool = False
    compile: bool = False
    change: Callable[[TrainingState], None] = lambda state: None


ROWS = {
    "ours, compiled": Row(keeps_memory=True, compile=True),
    "ours, checkpointing, compiled": Row(checkpointing=True, keeps_memory=True, compile=True),
    "ours, eager, freed memory returned": Row(),
    "foreach AdamW": Row(change=with_foreach),
    "stacking EMA": Row(change=with_stacking),
}


def peak_memory() -> float:
    """Peak resident memory so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of(name: str, case: Case) -> dict[str, float]:
    """Peak memory of two steps of a row, in bytes."""
    baseline, row = peak_memory(), ROWS[name]
    keep_freed_memory(row.keeps_memory)
    case = case._replace(options=replace(case.options, use_grad_checkpointing=row.checkpointing))
    network, batch = new_network(case).train(), new_batch(case)
    machine = replace(BF16, compile=row.compile)
    state, velocity = TrainingState(network, machine, DECAY, OptimizerOptions(lr=RATE)), machine.compiled(network)
    row.change(state)
    for _ in range(2):
        state.advance(velocity, OBJECTIVE, batch, RATE, 0.0)
    return {"peak": peak_memory() - baseline}


def theory_of(case: Case) -> dict[str, float]:
    """Bytes used by parameters, activations (without and with gradient checkpointing) and the weights' casts."""
    network, batch = new_network(case).train(), new_batch(case)
    owned = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved: dict[int, tuple[int, bool, bool, torch.Tensor]] = {}
    inputs: dict[int, int] = {}
    inside = [False]

    def enter(block: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inside[0] = True
        inputs.update({a.untyped_storage().data_ptr(): a.untyped_storage().nbytes() for a in arguments})

    def leave(*_: object) -> None:
        inside[0] = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:  # keep a reference, so that its address is not reused
            saved.setdefault(storage.data_ptr(), (storage.nbytes(), inside[0], is_cast(tensor), tensor))
        return tensor

    blocks = list(network.blocks)  # type: ignore[arg-type]
    for block in blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), BF16.autocast():
        output = network(batch.draws.t, batch.data, batch.condition)
    of_blocks = sum(size for size, inner, cast, _ in saved.values() if inner and not cast)
    others = sum(size for key, (size, inner, cast, _) in saved.items() if not (inner or cast) and key not in inputs)
    del output
    return {
        "states": BYTES_PER_PARAMETER
        * sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        "activations": of_blocks + others,
        "checkpointed": sum(inputs.values()) + others + of_blocks / len(blocks),
        "casts": sum(size for size, _, cast, _ in saved.values() if cast),
    }


def is_cast(tensor: torch.Tensor) -> bool:
    """Whether a saved tensor is a weight cast to another precision or viewed with another shape."""
    node = tensor.grad_fn
    while node is not None and node.name() in CASTS_AND_VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node is not tensor.grad_fn and hasattr(node, "variable")


def in_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run this module for one row in a separate process, and parse the result it prints."""
    flags = ["--network", options.network, "--batch_size", str(options.batch_size)]
    command = [sys.executable, "-m", "benchmarks.memory", "--row", name, *flags]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def draw_picture(peaks: dict[str, float], theory: dict[str, float], path: Path) -> None:
    """Plot peaks as bars and theory as lines."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    bars = axis.barh(list(peaks), [peak / 1e9 for peak in peaks.values()])
    axis.bar_label(bars, [f"{peak / 1e9:.1f}" for peak in peaks.values()], padding=3)
    for part, style in (("activations", "-"), ("checkpointed", "--")):
        name = "theory" if part == "activations" else "theory, checkpointing"
        axis.axvline((theory["states"] + theory[part]) / 1e9, color="grey", linestyle=style, label=name)
    axis.set(xlabel="peak memory of a step, GB", xlim=(0, 1.1e-9 * max(peaks.values())))
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print the table and plot it. Exit with code 1 if a row of ours exceeds theory by more than a quarter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="DiT-L/2", help="name of a DiT; default: DiT-L/2")
    parser.add_argument("--batch_size", type=int, default=4, help="default: 4")
    parser.add_argument("--output", type=Path, default=Path("docs/memory.png"), help="picture to write")
    parser.add_argument("--row", choices=("theory", *ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    case = Case(options.network, 32, options.batch_size, OPTIONS)
    if options.row:
        print(json.dumps(theory_of(case) if options.row == "theory" else peak_of(options.row, case)))
        return
    theory, peaks, rows, exceeds = in_process("theory", options), {}, [], False
    for name, row in ROWS.items():
        peaks[name] = in_process(name, options)["peak"]
        expected = theory["states"] + theory["checkpointed" if row.checkpointing else "activations"]
        exceeds |= name.startswith("ours") and peaks[name] > MAX_RATIO * expected
        rows.append([name, *(f"{value / 1e9:.2f} GB" for value in (peaks[name], expected))])
        rows[-1].append(f"{peaks[name] / expected:.3f}")
        print(rows[-1], flush=True)
    print(
        f"\n{options.network}, batch {options.batch_size}: {theory['states'] / BYTES_PER_PARAMETER / 1e6:.0f} M parameters\n"
    )
    print("; ".join(f"{name} {size / 1e9:.2f} GB" for name, size in theory.items()))
    print(f"\n{markdown_table(['step', 'peak', 'theory', 'ratio'], rows)}")
    draw_picture(peaks, theory, options.output)
    sys.exit(exceeds)


if __name__ == "__main__":
    main()
