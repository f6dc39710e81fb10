"""Claim: a few-step training step with a derivative takes at most 2.2 times a plain step, and with the coin at most 1.4 times.

    python -m benchmarks.few_step_cost [--network DiT-Mi/2] [--side 8] [--batch_size 128] [--rounds 9] [--precision fp32]

Times `TrainingState.advance` of every objective against flow matching with the same network, in alternation, by the processor
time of one thread, which other programs disturb little. A step that trains an interval of times is timed apart from a step that
trains the velocity; their mean with the objective's --flow_share is what a run pays. Guided targets add two forward passes to
either step.

Memory is the peak of two interval steps in a separate process, minus the memory in use before the network was built.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks._timing import markdown_table, processor_seconds
from benchmarks.memory import peak_memory
from benchmarks.training_step import DECAY, RATE, with_small_weights
from flow.flow_maps.objective import FlowMap
from flow.losses.draws import Draws
from flow.objectives import OBJECTIVES, Objective
from models.conditions import Condition
from models.dit import DiTOptions
from models.registry import build_network
from runtime.precision import Machine, keep_freed_memory
from training.data import Batch
from training.optimizers import OptimizerOptions
from training.state import TrainingState

LARGEST_JVP_STEP, LARGEST_MEAN = 2.2, 1.4
PLAIN = "flow_matching"
CLASSES = 10
GUIDED: dict[str, Any] = {"target_kappa": 0.6}
GUIDABLE = [name for name in OBJECTIVES if name != "consistency"]  # its targets have no velocity to guide
HEADER = ["objective", "velocity step", "interval step", "share of velocity steps", "mean", "peak memory"]


class Streams:
    """Random numbers of a step, as `RandomStreams` describes them, that select an interval step."""

    step, last_step = 500, 1000

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def uniform(self, purpose: str) -> torch.Tensor:
        """Uniform numbers, one per sample."""
        return torch.rand(self.shape[0])

    def normal(self, purpose: str) -> torch.Tensor:
        """Standard normal numbers with the shape of the batch."""
        return torch.randn(self.shape)

    def number(self, purpose: str) -> float:
        """A number that selects an interval step."""
        return 1.0  # above every --flow_share


class Step(NamedTuple):
    """A training step to time: its objective, and whether it trains an interval of times."""

    objective: str
    interval: bool
    guided: bool = False


def objective_of(step: Step) -> Objective:
    """The step's objective with its default options, and with guided targets if asked for."""
    family = OBJECTIVES[step.objective]
    return family.build(family.options(**GUIDED) if step.guided else family.options())


def draws_of(objective: Objective, step: Step, shape: tuple[int, ...]) -> Draws:
    """The draws of an interval step, or of a step that trains the velocity."""
    draws: Any = objective.draw(Streams(shape))
    if isinstance(objective, FlowMap):
        draws = draws._replace(until=draws.until if step.interval else None)
    if step.guided:
        rows = torch.ones(shape[0], dtype=torch.bool)
        draws = draws._replace(kept=rows, null=Condition(torch.full((shape[0],), CLASSES)))
    return draws


def advance(step: Step, own: argparse.Namespace) -> Callable[[], object]:
    """A function that takes the step."""
    torch.manual_seed(0)
    objective, trains_averages = objective_of(step), OBJECTIVES[step.objective].trains_averages
    options = DiTOptions(
        num_classes=CLASSES,
        label_dropout=0.1,
        mlp="swiglu",
        until_embedding="decoupled" if trains_averages else "none",
        log_variance_head=step.objective == "decoupled_mean_flow",
    )
    network = with_small_weights(build_network(own.network, own.side, options)).train()
    shape = (own.batch_size, 4, own.side, own.side)
    data, noise = torch.randn(2, *shape)
    labels = Condition(torch.randint(CLASSES, (own.batch_size,)))
    machine = Machine(torch.device("cpu"), own.precision)
    state = TrainingState(network, machine, DECAY, OptimizerOptions(lr=RATE))
    batch = Batch(data, noise, draws_of(objective, step, shape), labels)
    return partial(state.advance, network, objective, batch, RATE, 0.0)


def peak_of(step: Step, own: argparse.Namespace) -> float:
    """Peak memory of two steps in a separate process, in bytes."""
    flags = ["--network", own.network, "--side", str(own.side), "--batch_size", str(own.batch_size)]
    row = json.dumps([step.objective, step.interval, step.guided])
    command = [sys.executable, "-m", "benchmarks.few_step_cost", *flags, "--precision", own.precision, "--row", row]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure_peak(step: Step, own: argparse.Namespace) -> float:
    """Peak memory of two steps of this process."""
    before = peak_memory()
    keep_freed_memory(False)
    take = advance(step, own)
    take()
    take()
    return peak_memory() - before


def main() -> None:
    """Print the table. Exit with code 1 if an objective with a derivative takes more time than claimed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="DiT-Mi/2", help="name of a DiT; default: DiT-Mi/2")
    parser.add_argument("--side", type=int, default=8, help="side of the latents; default: 8")
    parser.add_argument("--batch_size", type=int, default=128, help="default: 128")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each kind; default: 9")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.row:
        print(measure_peak(Step(*json.loads(own.row)), own))
        return
    plain = Step(PLAIN, False)
    steps = [
        Step(name, True, guided)
        for name, family in OBJECTIVES.items()
        for guided in ((False, True) if name in GUIDABLE else (False,))
        if family.trains_averages
    ]
    # A new process counts its parent's memory at the time of its start, so peaks are measured before this process grows.
    torch.set_num_threads(1)
    peaks = {step: peak_of(step, own) for step in (plain, *steps)}
    keep_freed_memory()
    rows, exceeds = [], False
    for interval in steps:
        family, objective = OBJECTIVES[interval.objective], objective_of(interval)
        assert isinstance(objective, FlowMap)
        sides = [advance(each, own) for each in (plain, interval._replace(interval=False), interval)]
        for take in sides:
            take()  # memory and caches settle
        times = [[processor_seconds(take) for take in sides] for _ in range(own.rounds)]
        flow, average = (statistics.median(time[side] / time[0] for time in times) for side in (1, 2))
        mean = objective.flow_share * flow + (1 - objective.flow_share) * average
        if family.differentiates and not interval.guided:
            exceeds |= average > LARGEST_JVP_STEP or mean > LARGEST_MEAN
        row = [f"{interval.objective}{', guided target' if interval.guided else ''}", f"{flow:.2f}", f"{average:.2f}"]
        row += [f"{objective.flow_share:g}", f"{mean:.2f}"]
        rows.append([*row, f"{peaks[interval] / peaks[plain]:.2f}"])
        print(rows[-1], flush=True)
    print(f"\n{own.network}, batch {own.batch_size}, {own.precision}, one thread; relative to a step of")
    print(f"flow matching, whose peak is {peaks[plain] / 1e6:.0f} MB\n\n{markdown_table(HEADER, rows)}")
    sys.exit(exceeds)


if __name__ == "__main__":
    main()
