"""Claim: on a CPU, busy neighbors take their share of the processor and little more, and an idle machine loses nothing.

    python -m benchmarks.busy_machine [WORK ...] [--rounds 5] [--seconds 2]

Measures images per second with 0, 1 and 2 busy neighbors: Python processes of normal priority that only count, pinned to no
core. The work is sampling (200 images with the options of run_test.sh), and training (batches of 128 with the options of
run.sh), compiled and eager, of the default network with random weights. The reference's threads always spin at barriers; ours
yield to others (runtime/cpu/yielding.py). Both run in separate processes and alternate in turns of a few seconds. Their images
and trained weights must be bit-identical. Takes fifteen minutes.
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks._timing import markdown_table
from benchmarks.training_step import OBJECTIVE, Case, new_batch, new_network
from datasets_prep.image_dataset import DatasetFacts
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.dit import DiTOptions, hidden_matrices
from runtime.cpu.yielding import yield_to_others
from runtime.inference import for_sampling
from runtime.precision import Machine, keep_freed_memory
from sampling.sampler import Sampler, generate
from training.optimizers import OptimizerOptions
from training.state import TrainingState

REFERENCE, OURS = "spinning", "yielding (ours)"
NEIGHBORS = (0, 1, 2)
CASE = Case("DiT-Mi/2", 8, 128, DiTOptions(num_classes=10, label_dropout=0.1))
SAMPLED = 200
AUTOENCODER = Path(__file__).parents[1] / "pretrained" / "fashion_mnist_autoencoder"
CHECKED = 2  # calls whose results are compared
SETTLING = 1.5  # seconds of work before each turn, in which the threads notice that neighbors came or went
Work = Callable[[], torch.Tensor]  # does a piece of work and returns its result
Rates = dict[tuple[str, int, str], list[float]]  # images per second of each turn, by work, neighbors and side


def new_sampling() -> Work:
    """Sample a batch."""
    machine = Machine(torch.device("cpu"), "bf16", compile=True)
    sampler = Sampler(
        network=for_sampling(new_network(CASE).eval().requires_grad_(False), machine),
        autoencoder=load_autoencoder(AutoencoderOptions(str(AUTOENCODER)), 1),
        facts=DatasetFacts("fashion_mnist", 32, 1, None, False, ()),
        latent_shape=(4, CASE.size, CASE.size),
        num_classes=10,
        solver=SolverOptions("dpm", num_steps=8, time_shift=2.0),
        machine=machine,
        seed=0,
        guidance=GuidanceOptions(4.0, (0.2, 0.7)),
    )
    return torch.no_grad()(lambda: next(generate(sampler, range(SAMPLED), batch_size=SAMPLED)).images)


def new_training(compiled: bool) -> Work:
    """Take a training step."""
    machine, network, batch = Machine(torch.device("cpu"), "bf16", compile=compiled), new_network(CASE), new_batch(CASE)
    options = OptimizerOptions("muon", lr=1e-3, adam_betas=(0.9, 0.99))
    state = TrainingState(network, machine, 0.999, options, hidden_matrices=hidden_matrices)
    velocity = machine.compiled(network)

    def step() -> torch.Tensor:
        state.advance(velocity, OBJECTIVE, batch, 1e-4, 0.0)
        return torch.cat([parameter.detach().flatten() for parameter in state.parameters])

    return step


WORK: dict[str, tuple[Callable[[], Work], int]] = {  # builds the work; images of each call
    "sampling": (new_sampling, SAMPLED),
    "training": (lambda: new_training(True), CASE.batch_size),
    "eager": (lambda: new_training(False), CASE.batch_size),
}
_work: dict[str, Work] = {}  # of this process


def prepare(name: str, side: str) -> str:
    """Build a piece of work in this process. Returns a digest of its first results."""
    keep_freed_memory()
    if side == OURS and not yield_to_others():
        raise SystemExit("error: this machine has no Linux scheduler, or one core")
    _work[name] = WORK[name][0]()
    digest = hashlib.sha256()
    for _ in range(CHECKED):
        digest.update(_work[name]().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure(name: str, seconds: float) -> float:
    """Images per second of a turn."""
    _call_for(name, SETTLING)
    started = time.perf_counter()
    calls = _call_for(name, seconds)
    return calls * WORK[name][1] / (time.perf_counter() - started)


def _call_for(name: str, seconds: float) -> int:
    calls, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        _work[name]()
        calls += 1
    return calls


@contextmanager
def busy_neighbors(count: int) -> Iterator[None]:
    """Run processes of normal priority that never wait."""
    spin = [sys.executable, "-S", "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def start_sides(names: list[str]) -> dict[str, ProcessPoolExecutor]:
    """Start a process for each side, and check that their results are bit-identical."""
    sides = {side: ProcessPoolExecutor(1, get_context("spawn")) for side in (REFERENCE, OURS)}
    for name in names:
        digests = {sides[side].submit(prepare, name, side).result() for side in sides}
        if len(digests) > 1:
            raise SystemExit(f"error: {name}: results differ between the sides")
        print(f"{name}: bit-identical results", flush=True)
    return sides


def take_turns(sides: dict[str, ProcessPoolExecutor], names: list[str], seconds: float, rates: Rates) -> None:
    """Measure each kind of turn once, and add the results to `rates`."""
    for name, neighbors in product(names, NEIGHBORS):
        for side, process in sides.items():
            with busy_neighbors(neighbors):
                rate = process.submit(measure, name, seconds).result()
            rates.setdefault((name, neighbors, side), []).append(rate)


def table_of(rates: Rates) -> str:
    """Medians with quartiles, and shares of the same side's rate on an idle machine."""
    rows = []
    for name, side in dict.fromkeys((name, side) for name, _, side in rates):
        idle = statistics.median(rates[name, 0, side])
        row = [name, side]
        for neighbors in NEIGHBORS:
            low, middle, high = statistics.quantiles(rates[name, neighbors, side], n=4, method="inclusive")
            share = f"{100 * middle / idle:.0f} %: " if neighbors else ""
            row.append(f"{share}{middle:.0f} ({low:.0f} to {high:.0f})")
        rows.append(row)
    header = ["work", "threads", "images/s, alone (quartiles)", "one neighbor", "two neighbors"]
    return markdown_table(header, rows)


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", metavar="WORK", help=f"{', '.join(WORK)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each kind; default: 5")
    parser.add_argument("--seconds", type=float, default=2, help="least seconds of a turn; default: 2")
    options = parser.parse_args()
    if unknown := set(options.work) - WORK.keys():
        parser.error(f"unknown work: {', '.join(unknown)}; choose from {', '.join(WORK)}")
    names = options.work or list(WORK)
    sides, rates = start_sides(names), Rates()
    for _ in range(options.rounds):
        take_turns(sides, names, options.seconds, rates)
    print(
        f"\n{processor()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads\n\n{table_of(rates)}"
    )


if __name__ == "__main__":
    main()
