"""Claim: guided sampling is several times faster here than without tricks, at the same quality, on the same processor.

    python -m benchmarks.sampling [--output docs/sampling_speed.png] [flags of test_flow_latent.py]

First one guided evaluation of DiT-B/2 on 32 x 32 x 4 latents, scale 4: the reference is float32, eager, in two passes, one
with and one without the labels. Each side adds one trick to the side before; the last one is what --precision bf16
--compile does. Errors are those of the guided velocity, and of the network's own, relative to float32.

Then images/s from noises to uint8 images of a trained network, by default that of the embedded default: run_test.sh's
solver with all tricks, against dopri5 at 1e-5 in float32, eager. dopri5 has the guidance's interval, both halves in one batch,
and lets samples go that have arrived, too. Both draw the same noises batch by batch in turn; the FD is that of what was timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks._draws import Bench, DrawOptions, Draws, joined, request_benchmark, varied
from benchmarks._timing import compare, markdown_table
from benchmarks.training_step import peak, with_small_weights
from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.solvers import SolverOptions
from models.conditions import Condition
from models.dit import DiTOptions
from models.registry import build_network
from options import exit_cleanly, option
from runtime.cpu_kernels import with_cpu_kernels
from runtime.inference import compile_for_batches, hold_weights
from runtime.precision import Machine, keep_freed_memory

CLASSES, SCALE = 10, 4.0
REFERENCE = SolverOptions("dopri5", atol=1e-5, rtol=1e-5)
SIDES = ("two passes in float32", "halves in one batch", "bfloat16", "freed memory kept", "weights held", "compile")


@dataclass(frozen=True)
class SpeedOptions(DrawOptions):
    """Benchmark."""

    output: str = option("docs/sampling_speed.png", "plot to write")
    rounds: int = option(3, "turns of each side of the first part", minimum=1)
    evaluated: int = option(16, "samples of an evaluation", minimum=1)
    batches: int = option(3, "batches that each side of the second part draws", minimum=1)
    drawn: int = option(240, "samples of such a batch; a multiple of 80, for the error bar", minimum=80)


class Evaluation(NamedTuple):
    """A side: what a call computes, float32 [B, C, h, w], and the network in it, called with both halves."""

    velocity: Callable[[], torch.Tensor]
    network: Callable[[], torch.Tensor]
    keeps_memory: bool

    def __call__(self) -> torch.Tensor:
        """Evaluate the velocity once."""
        keep_freed_memory(self.keeps_memory)
        return self.velocity()


def new_network() -> torch.nn.Module:
    """With weights by a fixed seed; the layers that begin as zeros are made small, so that no trick sees zeros."""
    torch.manual_seed(0)
    network = build_network("DiT-B/2", 32, DiTOptions(num_classes=CLASSES, label_dropout=0.1))
    return with_cpu_kernels(with_small_weights(network)).eval().requires_grad_(False)


def evaluations(batch_size: int) -> dict[str, Evaluation]:
    """The sides, from the reference on."""
    torch.manual_seed(1)
    t, x = torch.tensor(0.5), torch.randn(batch_size, 4, 32, 32)
    labels = torch.arange(batch_size) % CLASSES
    asked, null = Condition(labels), Condition(torch.full_like(labels, CLASSES))
    halves = torch.full((2 * batch_size,), 0.5), torch.cat([x, x]), Condition(torch.cat([labels, null.labels]))  # type: ignore[list-item]
    machine = Machine(torch.device("cpu"), "bf16")
    plain, held = new_network(), hold_weights(new_network(), machine)

    def two_passes() -> torch.Tensor:
        towards, worse = (plain(t.expand(batch_size), x, condition) for condition in (asked, null))
        return worse + SCALE * (towards - worse)

    def side(network: Callable[..., torch.Tensor], precision: str, keeps_memory: bool) -> Evaluation:
        def evaluate(*inputs: Any) -> torch.Tensor:
            with Machine(machine.device, precision).autocast():
                return network(*inputs).float()

        guided = GuidedVelocity(evaluate, asked, null, GuidanceOptions(SCALE))
        return Evaluation(partial(guided, t, x), partial(evaluate, *halves), keeps_memory)

    sides = (
        Evaluation(two_passes, partial(plain, *halves), False),
        side(plain, "fp32", False),
        side(plain, "bf16", False),
        side(plain, "bf16", True),
        side(held, "bf16", True),
        side(compile_for_batches(held, machine), "bf16", True),
    )
    return dict(zip(SIDES, sides, strict=True))


@torch.no_grad()
def compare_evaluations(options: SpeedOptions) -> dict[str, float]:
    """Print the table of the first part; seconds of each side."""
    sides = evaluations(options.evaluated)
    seconds = compare(sides, options.rounds, settled=True)
    rows, before, reference = [], SIDES[0], sides[SIDES[0]]
    truth = reference.velocity(), reference.network()
    for name, side in sides.items():
        errors = (relative(side.velocity(), truth[0]), relative(side.network(), truth[1]))
        factors = (seconds[SIDES[0]] / seconds[name], seconds[before] / seconds[name])
        rows.append([name, f"{1e3 * seconds[name]:.0f} ms", *(f"{factor:.2f}" for factor in factors)])
        rows[-1] += [f"{error:.1e}" for error in errors]
        before = name
    header = ["side", "an evaluation", "times the first", "times the one before", "velocity's error", "network's error"]
    print(f"\nDiT-B/2, 32 x 32 x 4, batch {options.evaluated}, guided\n\n{markdown_table(header, rows)}")
    return seconds


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


def draw_in_turn(sides: Sequence[Bench], options: SpeedOptions) -> list[Draws]:
    """What each side draws; the first keeps freed memory. A small batch goes before, for what happens once."""
    loaded = [sides[0].loaded, varied(sides[1].loaded, REFERENCE)]
    drawn: list[Draws | None] = [None, None]
    for number in range(-1, options.batches):
        indices = range(CLASSES) if number < 0 else range(number * options.drawn, (number + 1) * options.drawn)
        for place, (bench, sampler) in enumerate(zip(sides, loaded, strict=True)):
            keep_freed_memory(place == 0)
            new, before = bench.draw_batch(sampler, indices), drawn[place]
            if number >= 0:
                drawn[place] = new if before is None else joined(before, new)
    return [draws for draws in drawn if draws is not None]


def rate(draws: Draws, options: SpeedOptions) -> float:
    """Images a second, in the median batch."""
    return 1 / median(draws.seconds.view(options.batches, -1).mean(1).tolist())


def compare_samples(options: SpeedOptions) -> dict[str, float]:
    """Print the table of the second part; images/s of each side."""
    fast = Bench(request_benchmark(str(__doc__), SpeedOptions, "--precision", "bf16", "--compile"), options.keep)
    slow = Bench(request_benchmark(str(__doc__), SpeedOptions, "--precision", "fp32", "--no-compile"), options.keep)
    drawn = draw_in_turn((fast, slow), options)
    solver = fast.loaded.sampler.solver
    names = [f"{solver.method}, {solver.steps} steps, all tricks", "dopri5 at 1e-05, float32, eager"]
    rates = {name: rate(draws, options) for name, draws in zip(names, drawn, strict=True)}
    rows = []
    for name, draws in zip(names, drawn, strict=True):
        costs = draws.costs()
        counts = [f"{costs['nfe']:.4g}", f"{costs['network_evaluations']:.4g}"]
        rows.append([name, *counts, f"{rates[name]:.3g}", f"{fast.distance(draws.features):.4f}"])
    difference = fast.distance(drawn[0].features) - fast.distance(drawn[1].features)
    error = fast.error_of_difference(*drawn)
    header = ["side", "evaluations", "of networks", "images/s", f"FD of {len(drawn[0].seconds)}"]
    print(
        f"\n{fast.loaded.path}, guided by {fast.loaded.sampler.guidance.cfg_scale:g}\n\n{markdown_table(header, rows)}"
    )
    print(f"\n{rates[names[0]] / rates[names[1]]:.1f} times as fast; FD differs by {difference:+.4f} ± {error:.4f}")
    return rates


def draw_picture(seconds: dict[str, float], rates: dict[str, float], path: str) -> None:
    """Seconds of an evaluation trick by trick, and images a second."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(2, 1, figsize=(8, 5), layout="constrained", height_ratios=(3, 1.3))
    first = seconds[SIDES[0]]
    bars = left.barh(list(seconds), list(seconds.values()))
    left.bar_label(bars, [f"{first / value:.1f} x" for value in seconds.values()], padding=3)
    left.set(xlabel="seconds of a guided evaluation, DiT-B/2", xlim=(0, 1.12 * max(seconds.values())))
    left.invert_yaxis()
    bars = right.barh(list(rates), list(rates.values()))
    right.bar_label(bars, [f"{value:.3g}" for value in rates.values()], padding=3)
    right.set(xlabel="images a second, embedded default", xlim=(0, 1.12 * max(rates.values())))
    right.invert_yaxis()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print both tables, and draw them."""
    options = request_benchmark(str(__doc__), SpeedOptions).own
    print(f"bfloat16 peak {peak() / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads", flush=True)
    seconds = compare_evaluations(options)
    draw_picture(seconds, compare_samples(options), options.output)


if __name__ == "__main__":
    exit_cleanly(main)
