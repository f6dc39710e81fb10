"""Claim: on an H100, training DiT-XL/2 reaches half of the measured bfloat16 peak, and scoring 2,000 images/s.

    python -m benchmarks.gpu [--device cuda] [--only training sampling autoencoder scoring] [--seconds 4]

Training compares `TrainingState.advance` on the compiled network with the plain steps of benchmarks/training_step.py, in
float32 without TF32 and in bfloat16. The variants run one after another, because together they may not fit. Each has its own
batch: 256 images, halved until they fit. Batch, images/s, TFLOP/s, memory and the share of the peak are ours. The peak is the
best of several large bfloat16 matrix products. A training step counts as three forward passes.

Sampling is guided, with Heun's method, in bfloat16, compiled, from noise to images of random weights. The autoencoder has
Stable Diffusion's architecture, at 256 x 256 pixels. Scoring computes Inception features at 299 x 299. Everything ends in
tables with the card, its driver and torch. `--device cpu` runs the same at small sizes, as its test does.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from benchmarks._gpu_timing import describe, fitting, moved, peak, release, seconds_of
from benchmarks._latents import new_autoencoder
from benchmarks._timing import markdown_table
from benchmarks.scoring import random_weights
from benchmarks.training_step import (
    DECAY,
    OBJECTIVE,
    RATE,
    UNET,
    Case,
    forward_operations,
    new_batch,
    new_network,
    stack,
    with_timms_patches,
)
from datasets_prep.datasets import DatasetFacts
from evaluation.features.inception import InceptionFeatures
from exits import exit_cleanly
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.autoencoders.pixels import PixelSpace, decode_images
from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.guided_unet import GuidedUNetOptions
from models.registry import ORIGIN_ADM
from runtime.inference import for_sampling
from runtime.memory import free_memory
from runtime.precision import DeviceOptions, Machine, choose_device
from sampling.sampler import Sampler, generate
from training.optimizers import OptimizerOptions
from training.state import TrainingState

CLASSES = 1000
DIT = DiTOptions(num_classes=CLASSES, label_dropout=0.1)
LARGEST_BATCH = 256


class Sizes(NamedTuple):
    """The networks and sizes to measure."""

    networks: dict[str, Case]
    peak_side: int
    sampled: Case
    samples: int
    steps: int
    encoded: int
    side: int
    scored: int
    dims: int


def _case(model_type: str, options: Any, size: int = 32, batch: int = LARGEST_BATCH) -> Case:
    return Case(model_type, size, batch, options)


GPU = Sizes(
    networks={
        **{f"DiT-{size}/2": _case(f"DiT-{size}/2", DIT) for size in ("S", "B", "L", "XL")},
        "adm": _case("adm", EdmUNetOptions(**UNET)),
        "guided-diffusion": _case(ORIGIN_ADM, GuidedUNetOptions(**UNET)),
    },
    peak_side=8192,
    sampled=_case("DiT-XL/2", DIT),
    samples=64,
    steps=20,
    encoded=32,
    side=256,
    scored=256,
    dims=2048,
)
CPU = GPU._replace(
    networks={
        "DiT-Mi/2": _case("DiT-Mi/2", DIT, 8, 4),
        "adm": _case("adm", EdmUNetOptions(**{**UNET, "nf": 32}), 8, 4),
    },
    peak_side=256,
    sampled=_case("DiT-Mi/2", DIT, 8, 2),
    samples=2,
    steps=2,
    encoded=1,
    side=32,
    scored=2,
    dims=64,
)


class Plain:
    """A plain, eager training step, as in benchmarks/training_step.py: layers of torch and timm, unfused AdamW and EMA."""

    def __init__(self, case: Case, machine: Machine) -> None:
        self.machine = machine
        self.network = with_timms_patches(new_network(case)).to(machine.device)
        self.batch = moved(new_batch(case), machine.device)
        self.parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, foreach=False)
        self.average = stack(self.parameters)

    def __call__(self) -> None:
        """Take a training step."""
        t = self.batch.draws[0].view(-1, 1, 1, 1)
        x_t = (1 - t) * self.batch.data + t * self.batch.noise
        self.optimizer.zero_grad()
        with self.machine.autocast():
            predicted = self.network(self.batch.draws[0], x_t, self.batch.condition)
        functional.mse_loss(predicted.float(), self.batch.noise - self.batch.data).backward()
        self.optimizer.step()
        with torch.no_grad():
            self.average.mul_(DECAY).add_(stack(self.parameters), alpha=1 - DECAY)


class Ours:
    """The step of training/state.py, compiled in bfloat16."""

    def __init__(self, case: Case, machine: Machine) -> None:
        network = new_network(case).train()
        self.state = TrainingState(network, machine, DECAY, OptimizerOptions(lr=RATE))
        self.velocity, self.batch = machine.compiled(network, always_alike=True), moved(new_batch(case), machine.device)

    def __call__(self) -> None:
        """Take a training step."""
        self.state.advance(self.velocity, OBJECTIVE, self.batch, RATE, 0.0)


def measure_training(name: str, case: Case, device: torch.device, best: float, seconds: float) -> list[str]:
    """One row: images/s, TFLOP/s, share of the peak, memory, and speedups over the plain steps."""
    rates: dict[str, float] = {}
    size, memory = case.batch_size, ""
    machine = Machine(device, "bf16", compile=True, replays=device.type != "cpu")
    variants: dict[str, Callable[[Case], Callable[[], None]]] = {
        "ours": lambda chosen: Ours(chosen, machine),
        "bf16": lambda chosen: Plain(chosen, Machine(device, "bf16")),
        "fp32": lambda chosen: Plain(chosen, Machine(device, "fp32")),
    }
    for variant, make in variants.items():
        step, used = fitting(case, make, device)
        rates[variant] = used / seconds_of(step, device, seconds)
        if variant == "ours":
            size = used
            memory = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if device.type != "cpu" else "-"
        del step
    done = 3 * forward_operations(case._replace(batch_size=1)) * rates["ours"]
    row = [name, f"{size}", f"{rates['ours']:,.0f}", f"{done / 1e12:.3g}", f"{100 * done / best:.0f} %", memory]
    return [*row, *(f"{rates['ours'] / rates[variant]:.2f}" for variant in ("fp32", "bf16"))]


def measure_sampling(sizes: Sizes, device: torch.device, seconds: float) -> list[str]:
    """One row: guided samples per second, without decoding."""
    case, on_cpu = sizes.sampled, device.type == "cpu"
    machine = Machine(device, "bf16", compile=not on_cpu)
    network: nn.Module = new_network(case).eval().requires_grad_(False).to(device)
    sampler = Sampler(
        network=for_sampling(network, machine),
        autoencoder=PixelSpace(4),
        facts=DatasetFacts("noise", case.size, 4, None, False, ()),
        latent_shape=(4, case.size, case.size),
        num_classes=CLASSES,
        solver=SolverOptions("heun", num_steps=sizes.steps),
        machine=machine,
        seed=0,
        guidance=GuidanceOptions(1.5),
    )
    run = lambda: list(generate(sampler, range(sizes.samples), batch_size=sizes.samples))  # noqa: E731
    rate = sizes.samples / seconds_of(run, device, seconds, least=1)
    return [f"{case.model_type}, guided, Heun, {sizes.steps} steps, bf16", f"{sizes.samples}", f"{rate:,.2f}"]


def measure_autoencoder(sizes: Sizes, device: torch.device, seconds: float) -> list[list[str]]:
    """Rows: encoded images per second in bfloat16, and decoded ones in float32."""
    autoencoder = new_autoencoder().to(device)
    images = torch.randint(256, (sizes.encoded, 3, sizes.side, sizes.side), dtype=torch.uint8, device=device)

    def encode() -> torch.Tensor:
        with Machine(device, "bf16").autocast():
            return autoencoder.encode(images)

    latents = autoencoder.sample(encode())
    runs = {"encoding, bf16": encode, "decoding, fp32": lambda: decode_images(autoencoder, latents)}
    rates = {name: sizes.encoded / seconds_of(run, device, seconds) for name, run in runs.items()}
    return [[f"{name}, {sizes.side} pixels", f"{sizes.encoded}", f"{rate:,.1f}"] for name, rate in rates.items()]


def measure_scoring(sizes: Sizes, device: torch.device, seconds: float) -> list[list[str]]:
    """Rows: images per second through the feature network, in both precisions."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.pth")
        torch.save(random_weights(), weights)
        for precision in ("fp32", "bf16"):
            features = InceptionFeatures(weights, device, sizes.dims, precision)
            images = torch.randint(256, (sizes.scored, 3, sizes.side, sizes.side), dtype=torch.uint8)
            seconds_each = seconds_of(lambda: features(images, {"features"})["features"].cpu(), device, seconds)  # noqa: B023
            rate = sizes.scored / seconds_each
            rows.append([f"Inception features, {sizes.dims}, {precision}", f"{sizes.scored}", f"{rate:,.0f}"])
    return rows


def run(device: torch.device, parts: Iterable[str], seconds: float) -> str:
    """Measure the parts; returns the tables."""
    sizes = CPU if device.type == "cpu" else GPU
    lines, rows = [f"{describe(device)}; {time.strftime('%Y-%m-%d')}"], []
    space = free_memory(device)
    if space:
        lines.append(f"{space[0] / 1e9:.1f} GB free at the start")
    if "training" in parts:
        best = peak(device, sizes.peak_side)
        table = []
        for name, case in sizes.networks.items():
            table.append(measure_training(name, case, device, best, seconds))
            print(table[-1], flush=True)
        header = [
            "training, 32 x 32 x 4",
            "batch",
            "images/s",
            "TFLOP/s",
            f"of the peak ({best / 1e12:.3g} TFLOP/s)",
            "memory",
        ]
        lines.append(markdown_table([*header, "times plain fp32", "times plain bf16"], table))
    measures: dict[str, Callable[[], list[list[str]]]] = {
        "sampling": lambda: [measure_sampling(sizes, device, seconds)],
        "autoencoder": lambda: measure_autoencoder(sizes, device, seconds),
        "scoring": lambda: measure_scoring(sizes, device, seconds),
    }
    for name, measure in measures.items():
        if name in parts:
            release(device)
            rows += measure()
            print(rows[-1], flush=True)
    if rows:
        lines.append(markdown_table(["work", "batch", "images/s"], rows))
    return "\n\n".join(lines)


PARTS = ("training", "sampling", "autoencoder", "scoring")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (small sizes); default: cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; default: all")
    parser.add_argument("--seconds", type=float, default=4, help="seconds per measurement, at least; default: 4")
    options = parser.parse_args()
    print("\n" + run(choose_device(DeviceOptions(options.device)), options.only, options.seconds))


if __name__ == "__main__":
    exit_cleanly(main)
