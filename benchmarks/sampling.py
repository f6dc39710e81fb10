"""Claim: the optimizations here make guided sampling several times faster at equal quality, on the same processor.

    python -m benchmarks.sampling [--output docs/sampling_speed.png] [flags of test_flow_latent.py]

Part 1 times one guided evaluation of DiT-B/2 on 32 x 32 x 4 latents at guidance scale 4. The reference runs eagerly in
float32, in two passes, one with and one without labels. Each variant adds one optimization to the previous one; the last is
equivalent to --precision bf16 --compile. Errors are relative to float32, for the guided velocity and for the network's output.

Part 2 measures images/s of a trained network, from noise to uint8 images. The default is the model that run.sh trains. It
compares run_test.sh's solver with all optimizations to dopri5 at tolerance 1e-5, eager in float32. dopri5 also uses the
guidance interval, evaluates both halves in one batch, and drops samples that have finished. Both variants alternate batch by
batch on the same noise. FD is computed from the timed samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks._samples import Bench, BenchmarkOptions, Samples, concatenate, request_benchmark, varied
from benchmarks._timing import compare, markdown_table
from benchmarks.training_step import peak, with_small_weights
from exits import exit_cleanly
from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.solvers import SolverOptions
from models.conditions import Condition
from models.dit import DiTOptions
from models.registry import build_network
from options import option
from runtime.cpu.kernels import with_cpu_kernels
from runtime.inference import compile_for_batches, hold_weights
from runtime.precision import Machine, keep_freed_memory

CLASSES, SCALE = 10, 4.0
REFERENCE = SolverOptions("dopri5", atol=1e-5, rtol=1e-5)
SIDES = (
    "two passes in float32",
    "one batch for both halves",
    "bfloat16",
    "freed memory kept",
    "weights cast once",
    "compile",
)


@dataclass(frozen=True)
class SpeedOptions(BenchmarkOptions):
    """Benchmark."""

    output: str = option("docs/sampling_speed.png", "plot to write")
    rounds: int = option(3, "part 1: turns per variant", minimum=1)
    evaluated: int = option(16, "part 1: samples per evaluation", minimum=1)
    batches: int = option(3, "part 2: batches per variant", minimum=1)
    drawn: int = option(240, "part 2: samples per batch; must be a multiple of 80 for the error bar", minimum=80)


class Evaluation(NamedTuple):
    """A variant of the guided evaluation.

    Attributes:
        velocity: computes the guided velocity, float32 [B, C, h, w].
        network: computes the network's output for both halves of the guided batch.
        keeps_memory: whether the allocator keeps freed memory.
    """

    velocity: Callable[[], torch.Tensor]
    network: Callable[[], torch.Tensor]
    keeps_memory: bool

    def __call__(self) -> torch.Tensor:
        """Evaluate the guided velocity once."""
        keep_freed_memory(self.keeps_memory)
        return self.velocity()


def new_network() -> torch.nn.Module:
    """A DiT-B/2 with weights from a fixed seed. Zero-initialized layers get small weights, so that outputs are not zero."""
    torch.manual_seed(0)
    network = build_network("DiT-B/2", 32, DiTOptions(num_classes=CLASSES, label_dropout=0.1))
    return with_cpu_kernels(with_small_weights(network)).eval().requires_grad_(False)


def evaluations(batch_size: int) -> dict[str, Evaluation]:
    """All variants, starting with the reference."""
    torch.manual_seed(1)
    t, x = torch.tensor(0.5), torch.randn(batch_size, 4, 32, 32)
    labels = torch.arange(batch_size) % CLASSES
    labeled, null = Condition(labels), Condition(torch.full_like(labels, CLASSES))
    halves = torch.full((2 * batch_size,), 0.5), torch.cat([x, x]), Condition(torch.cat([labels, null.labels]))  # type: ignore[list-item]
    machine = Machine(torch.device("cpu"), "bf16")
    plain, held = new_network(), hold_weights(new_network(), machine)

    def two_passes() -> torch.Tensor:
        with_labels, without = (plain(t.expand(batch_size), x, condition) for condition in (labeled, null))
        return without + SCALE * (with_labels - without)

    def side(network: Callable[..., torch.Tensor], precision: str, keeps_memory: bool) -> Evaluation:
        def evaluate(*inputs: Any) -> torch.Tensor:
            with Machine(machine.device, precision).autocast():
                return network(*inputs).float()

        guided = GuidedVelocity(evaluate, labeled, null, GuidanceOptions(SCALE))
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
    """Print part 1's table. Returns seconds per evaluation of each variant."""
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
    header = ["variant", "one evaluation", "speedup", "speedup over the previous", "velocity error", "network error"]
    print(f"\nDiT-B/2, 32 x 32 x 4, batch {options.evaluated}, guided\n\n{markdown_table(header, rows)}")
    return seconds


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


def sample_in_turns(sides: Sequence[Bench], options: SpeedOptions) -> list[Samples]:
    """Samples of both variants, after a small warm-up batch each. Only the first variant keeps freed memory."""
    loaded = [sides[0].loaded, varied(sides[1].loaded, REFERENCE)]
    collected: list[Samples | None] = [None, None]
    for number in range(-1, options.batches):
        indices = range(CLASSES) if number < 0 else range(number * options.drawn, (number + 1) * options.drawn)
        for side, (bench, sampler) in enumerate(zip(sides, loaded, strict=True)):
            keep_freed_memory(side == 0)
            new, before = bench.sample_batch(sampler, indices), collected[side]
            if number >= 0:
                collected[side] = new if before is None else concatenate(before, new)
    return [samples for samples in collected if samples is not None]


def rate(samples: Samples, options: SpeedOptions) -> float:
    """Images per second in the median batch."""
    return 1 / median(samples.seconds.view(options.batches, -1).mean(1).tolist())


def compare_samples(options: SpeedOptions) -> dict[str, float]:
    """Print part 2's table. Returns images/s of each variant."""
    fast = Bench(request_benchmark(str(__doc__), SpeedOptions, "--precision", "bf16", "--compile"), options.keep)
    slow = Bench(request_benchmark(str(__doc__), SpeedOptions, "--precision", "fp32", "--no-compile"), options.keep)
    both = sample_in_turns((fast, slow), options)
    solver = fast.loaded.sampler.solver
    names = [f"{solver.method}, {solver.steps} steps, all optimizations", "dopri5 at 1e-05, float32, eager"]
    rates = {name: rate(samples, options) for name, samples in zip(names, both, strict=True)}
    rows = []
    for name, samples in zip(names, both, strict=True):
        costs = samples.costs()
        counts = [f"{costs['nfe']:.4g}", f"{costs['network_evaluations']:.4g}"]
        rows.append([name, *counts, f"{rates[name]:.3g}", f"{fast.distance(samples.features):.4f}"])
    difference = fast.distance(both[0].features) - fast.distance(both[1].features)
    error = fast.error_of_difference(*both)
    header = ["variant", "evaluations", "network evaluations", "images/s", f"FD of {len(both[0].seconds)} samples"]
    scale = fast.loaded.sampler.guidance.cfg_scale
    print(f"\n{fast.loaded.path}, guidance scale {scale:g}\n\n{markdown_table(header, rows)}")
    print(f"\n{rates[names[0]] / rates[names[1]]:.1f} times as fast; FD differs by {difference:+.4f} ± {error:.4f}")
    return rates


def draw_picture(seconds: dict[str, float], rates: dict[str, float], path: str) -> None:
    """Plot seconds per evaluation of each variant (part 1), and images per second (part 2)."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(2, 1, figsize=(8, 5), layout="constrained", height_ratios=(3, 1.3))
    first = seconds[SIDES[0]]
    bars = left.barh(list(seconds), list(seconds.values()))
    left.bar_label(bars, [f"{first / value:.1f} x" for value in seconds.values()], padding=3)
    left.set(xlabel="seconds per guided evaluation, DiT-B/2", xlim=(0, 1.12 * max(seconds.values())))
    left.invert_yaxis()
    bars = right.barh(list(rates), list(rates.values()))
    right.bar_label(bars, [f"{value:.3g}" for value in rates.values()], padding=3)
    right.set(xlabel="images per second, default experiment", xlim=(0, 1.12 * max(rates.values())))
    right.invert_yaxis()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print both tables and plot them."""
    options = request_benchmark(str(__doc__), SpeedOptions).own
    print(f"bfloat16 peak {peak() / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads", flush=True)
    seconds = compare_evaluations(options)
    draw_picture(seconds, compare_samples(options), options.output)


if __name__ == "__main__":
    exit_cleanly(main)
