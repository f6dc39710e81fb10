"""Claim: a training step here is several times faster than a plain step like LFM's, on the same processor.

    python -m benchmarks.training_step [NETWORK ...] [--seconds 20] [--output docs/training_step.png]

The reference is a plain, eager step in float32 with torch's and timm's layers. Its AdamW updates one parameter after another,
and its EMA is one vector of concatenated parameters. Each variant adds one optimization to the previous one. The last is
ours: `TrainingState.advance` on the compiled network with our layers.

Each variant alternates with the reference in turns of a second or of one step, on the same batch and from the same weights.
Both run in separate processes. Their results must agree to the tolerances in AGREEMENT: the first loss to 1e-2, and how two
steps change the velocity of a few images to 0.05.

GFLOP/s are the operations counted in a forward pass, times three for forward and backward, per second. The peak is the best
of several large bfloat16 matrix products, measured just before. Each network takes two to six minutes.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed
from torch import nn
from torch.nn import functional

from benchmarks._timing import Comparison, Side, compare, compare_apart, markdown_table
from benchmarks.scaling import operations
from flow.objectives import FlowMatching, Times
from flow.paths import PathOptions
from models.conditions import Condition
from models.dit import DiT, DiTOptions
from models.edm_unet import EdmUNetOptions
from models.family import FamilyOptions
from models.guided_unet import GuidedUNetOptions
from models.registry import ORIGIN_ADM, build_network
from runtime.cpu.kernels import with_cpu_kernels
from runtime.precision import Machine, keep_freed_memory
from training.data import Batch
from training.optimizers import OptimizerOptions
from training.state import TrainingState

RATE, DECAY = 1e-4, 0.9999
OBJECTIVE = FlowMatching(PathOptions(sigma_min=0.0))
AGREEMENT = {"first loss": 1e-2, "change of the velocity": 0.05}
WATCHED = 2  # images whose velocity is compared
UNET: dict[str, Any] = {"nf": 128, "ch_mult": (1, 2, 2), "num_in_channels": 4, "num_out_channels": 4}


class Case(NamedTuple):
    """A network, its latent size and its batch size."""

    model_type: str
    size: int
    batch_size: int
    options: FamilyOptions


CASES = {
    "embedded default": Case("DiT-Mi/2", 8, 256, DiTOptions(num_classes=10)),
    "DiT-S/2": Case("DiT-S/2", 32, 16, DiTOptions(num_classes=10)),
    "DiT-B/2": Case("DiT-B/2", 32, 16, DiTOptions(num_classes=10)),
    "adm": Case("adm", 32, 8, EdmUNetOptions(**UNET)),
    "guided-diffusion": Case(ORIGIN_ADM, 32, 8, GuidedUNetOptions(**UNET)),
}


class Effect:
    """Records how training steps change a network: its losses, and its velocity on a few images."""

    def __init__(self, network: nn.Module, batch: Batch) -> None:
        self.network = network
        self.inputs = batch.draws.t[:WATCHED], batch.data[:WATCHED], Condition(batch.condition.labels[:WATCHED])  # type: ignore[index]
        self.before = self.velocity()
        self.losses: list[float] = []

    @torch.no_grad()
    def velocity(self) -> torch.Tensor:
        """The velocity on the watched images, in float32."""
        return self.network(*self.inputs).flatten()

    def results(self) -> dict[str, Sequence[float]]:
        """The first loss, and the change of the velocity since the start."""
        return {"first loss": self.losses[:1], "change of the velocity": (self.velocity() - self.before).tolist()}


class PlainStep:
    """A plain training step on one batch, with a switch for each optimization."""

    def __init__(
        self,
        case: Case,
        *,
        fused: bool = False,
        in_place: bool = False,
        bf16: bool = False,
        keeps_memory: bool = False,
    ) -> None:
        self.network, self.batch = with_timms_patches(new_network(case)), new_batch(case)
        self.effect = Effect(self.network, self.batch)
        self.results = self.effect.results
        self.in_place, self.keeps_memory = in_place, keeps_memory
        self.machine = Machine(torch.device("cpu"), "bf16" if bf16 else "fp32")
        self.parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, foreach=False, fused=fused)
        self.averages = [parameter.detach().clone() for parameter in self.parameters] if in_place else []
        self.stacked = torch.empty(0) if in_place else stack(self.parameters)

    def __call__(self) -> None:
        """Take a training step."""
        keep_freed_memory(self.keeps_memory)
        t = self.batch.draws.t.view(-1, 1, 1, 1)
        x_t = (1 - t) * self.batch.data + t * self.batch.noise
        self.optimizer.zero_grad()
        with self.machine.autocast():
            predicted = self.network(self.batch.draws.t, x_t, self.batch.condition)
        loss = functional.mse_loss(predicted.float(), self.batch.noise - self.batch.data)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            if self.in_place:
                torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - DECAY)
            else:
                self.stacked.mul_(DECAY).add_(stack(self.parameters), alpha=1 - DECAY)
        self.effect.losses.append(loss.item())


def stack(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Concatenate all parameters into one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def with_timms_patches(network: nn.Module) -> nn.Module:
    """Replace a DiT's patch embedding with timm's, in place. Returns the network.

    timm's layer is a convolution followed by a transpose. Our other layers fall back to torch's unless they are compiled.
    """
    if isinstance(network, DiT):
        ours = network.x_embedder
        channels, width = network.options.num_in_channels, network.pos_embed.shape[-1]
        network.x_embedder = PatchEmbed(None, network.patch_size, channels, width, strict_img_size=False)
        network.x_embedder.load_state_dict(ours.state_dict())
    return network


class OurStep:
    """The compiled training step of training/state.py on one batch."""

    def __init__(self, case: Case) -> None:
        machine = Machine(torch.device("cpu"), "bf16", compile=True)
        network = new_network(case)
        self.state = TrainingState(network, machine, DECAY, OptimizerOptions(lr=RATE))
        self.velocity, self.batch = machine.compiled(network), new_batch(case)
        self.effect = Effect(network, self.batch)
        self.results = self.effect.results

    def __call__(self) -> None:
        """Take a training step."""
        keep_freed_memory()
        self.state.sums.zero_()
        self.state.advance(self.velocity, OBJECTIVE, self.batch, RATE, 0.0)
        self.effect.losses.append(self.state.sums[0].item())


# Each variant also turns on the switches before it. OURS follows them.
SWITCHES = {
    "fused AdamW": "fused",
    "in-place EMA": "in_place",
    "bfloat16": "bf16",
    "freed memory kept": "keeps_memory",
}
OURS = "compiled (ours)"


def new_network(case: Case) -> nn.Module:
    """Build a network with weights from a fixed seed, and with our CPU kernels.

    Zero-initialized layers get small weights, so that gradients reach every weight. In eager mode, our kernels change nothing
    in float32, and only attention in bfloat16.
    """
    torch.manual_seed(0)
    return with_cpu_kernels(with_small_weights(build_network(case.model_type, case.size, case.options)))


@torch.no_grad()
def with_small_weights(network: nn.Module) -> nn.Module:
    """Replace zero-initialized weights with small random ones, in place. Returns the network."""
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(std=0.02)
    return network


def new_batch(case: Case) -> Batch:
    torch.manual_seed(1)
    data, noise = torch.randn(2, case.batch_size, 4, case.size, case.size)
    labels = torch.zeros(case.batch_size, dtype=torch.long)
    return Batch(data, noise, Times(torch.rand(case.batch_size)), Condition(labels))


def forward_operations(case: Case) -> int:
    """Floating-point operations of a forward pass on the batch. A multiply-add counts as two."""
    with torch.device("meta"):  # attention's operations are counted only on the meta device
        batch = new_batch(case)
        network = build_network(case.model_type, case.size, case.options)
        return operations(network, batch.draws.t, batch.data, batch.condition)


def peak(side: int = 4096) -> float:
    """Peak FLOP/s: the fastest of several products of square bfloat16 matrices."""
    a, b = torch.randn(2, side, side).bfloat16()
    seconds = min(compare({"product": lambda: a @ b}, rounds=1)["product"] for _ in range(5))
    return 2 * side**3 / seconds


def measure(case: Case, seconds: float) -> dict[str, Comparison]:
    """Compare each variant with the reference."""
    sides: dict[str, Callable[[], Side]] = {}
    switches = dict[str, bool]()
    for name, switch in SWITCHES.items():
        switches[switch] = True
        sides[name] = partial(PlainStep, case, **switches)
    sides[OURS] = partial(OurStep, case)
    return compare_apart(partial(PlainStep, case), sides, seconds, AGREEMENT)


def draw_picture(results: dict[str, dict[str, Comparison]], path: Path) -> None:
    """Plot speedups over the reference by network and variant."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    names = [*SWITCHES, OURS]
    for number, name in enumerate(names):
        positions = [network + (number - (len(names) - 1) / 2) * 0.16 for network in range(len(results))]
        bars = axis.bar(positions, [sides[name].times for sides in results.values()], 0.15, label=name)
    axis.bar_label(bars, fmt="%.1f", padding=2)
    axis.axhline(1, color="grey", linewidth=1)
    axis.set_xticks(range(len(results)), list(results))
    axis.margins(y=0.1)
    axis.set_ylabel("speedup over the reference")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, frameon=False)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print a table of all networks and plot it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"{', '.join(CASES)}; default: all")
    parser.add_argument(
        "--seconds", type=float, default=20, help="seconds per variant, rounded up to whole turns; default: 20"
    )
    parser.add_argument(
        "--output", type=Path, help="picture to write; default: docs/training_step.png if all networks are run"
    )
    options = parser.parse_args()
    if unknown := set(options.networks) - CASES.keys():
        parser.error(f"unknown networks: {', '.join(unknown)}; choose from {', '.join(CASES)}")
    results, rows = {}, []
    for name in options.networks or CASES:
        best = peak()
        results[name] = sides = measure(CASES[name], options.seconds)
        ours = sides[OURS]
        rate = 3 * forward_operations(CASES[name]) / ours.side
        rows.append([name, f"{1e3 * ours.reference:.0f} ms", f"{1e3 * ours.side:.0f} ms"])
        rows[-1] += [f"{side.times:.2f}" for side in sides.values()]
        rows[-1] += [f"{rate / 1e9:.0f}", f"{100 * rate / best:.0f} % of {best / 1e9:.0f}"]
        print(rows[-1], flush=True)
    header = ["network", "reference", "ours", *SWITCHES, OURS, "GFLOP/s", "share of the peak"]
    print(f"\nSpeedup over the reference\n\n{markdown_table(header, rows)}")
    if options.output or not options.networks:
        draw_picture(results, options.output or Path("docs/training_step.png"))


if __name__ == "__main__":
    main()
