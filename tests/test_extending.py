"""Runs docs/extending.md's examples verbatim: each is registered, trained for two steps, saved, resumed and sampled."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from checkpoints.files import read_weights
from command_line import parse_options
from datasets_prep.datasets import DATASETS
from datasets_prep.image_dataset import DatasetFacts, ImageDataset, Split
from flow.guidance import Network
from flow.objectives import OBJECTIVES, FlowMatching, ObjectiveFamily, Times
from flow.ode import Draw, Solution, SolverOptions, Velocity, solution_with_count, time_tensor
from flow.paths import PathOptions, straight_path
from flow.solvers import SOLVERS, Method
from models.autoencoders.loading import AUTOENCODERS, AutoencoderOptions
from models.autoencoders.pixels import images_to_pixels
from models.autoencoders.protocol import AutoencoderFacts
from models.conditions import Condition
from models.dit import DIT_SIZES, DiTOptions, build_dit
from models.embeddings import LabelEmbedding, TimeEmbedding
from models.family import ClassOptions, Family
from models.registry import NETWORKS
from options import option
from runtime.distributed import Processes
from sampling.script import mode_groups, run_modes
from tasks.task import GENERATION
from training.script import run_training
from training.setup import training_groups

# A network.


@dataclass(frozen=True)
class ConvNetOptions(ClassOptions):
    """convnet."""

    conv_width: int = option(64, "convnet: channels of the hidden layers", minimum=8)
    conv_depth: int = option(4, "convnet: residual layers", minimum=1)


class ConvNet(nn.Module):
    """Residual convolutions under an embedding of time and label, for latents of any size."""

    def __init__(self, size: int, options: ConvNetOptions) -> None:
        super().__init__()
        self.options = options
        width = options.conv_width
        self.time = TimeEmbedding(32, width)
        self.labels = LabelEmbedding(options.classes + 1, width)
        self.input = nn.Conv2d(options.num_in_channels, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(options.conv_depth))
        self.output = nn.Conv2d(width, options.num_out_channels, 3, padding=1)

    def forward(self, t: torch.Tensor, x: torch.Tensor, condition: Condition = Condition()) -> torch.Tensor:  # noqa: B008
        """Velocity [B, C, h, w] at times t [B] and points x [B, C', h, w]; label K is the null class."""
        embedding = self.time(t.expand(len(x))) + self.labels(condition.labels)  # [B, D]
        x = self.input(x)
        for layer in self.layers:
            x = x + layer(functional.silu(x + embedding[:, :, None, None]))
        return self.output(functional.silu(x))


NETWORKS["convnet"] = Family(ConvNetOptions, ConvNet)


# An objective.


@dataclass(frozen=True)
class HuberOptions(PathOptions):
    """Objective pseudo_huber."""

    huber_scale: float = option(
        0.1, "pseudo_huber: errors far below it count squared, far above it linearly", minimum=0
    )


class PseudoHuber(FlowMatching):
    """Flow matching with the pseudo-Huber distance sqrt(|e|^2 + c^2) - c of each sample's error e."""

    options: HuberOptions

    def loss(
        self, network: Network, data: torch.Tensor, noise: torch.Tensor, draws: Times, condition: Any
    ) -> torch.Tensor:
        """Distances [B], with |e|^2 averaged over channels and positions."""
        x_t, velocity = straight_path(draws.t, data, noise, self.options.sigma_min)
        squared = (network(draws.t, x_t, condition).float() - velocity).square().flatten(1).mean(1)
        return (squared + self.options.huber_scale**2).sqrt() - self.options.huber_scale


OBJECTIVES["pseudo_huber"] = ObjectiveFamily(HuberOptions, PseudoHuber)


# An autoencoder.


class SpaceToDepth:
    """Every square of 4 x 4 pixels becomes the channels of one latent position: lossless, without a posterior."""

    factor = 4
    has_posterior = False
    is_pixel_space = False

    def __init__(self, channels: int) -> None:
        self.latent_channels = self.moment_channels = channels * self.factor**2

    def describe(self) -> AutoencoderFacts:
        """The name under which it is registered; there are no weights to hash."""
        return AutoencoderFacts(id="space_to_depth", sha256="space_to_depth")

    def to(self, device: torch.device | str) -> Self:
        """There are no weights to move."""
        return self

    def restore_scale(self, stored: AutoencoderFacts) -> None:
        """Latents lie in [-1, 1] as pixels do."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images [B, C, H, W] to latents [B, 16 C, H / 4, W / 4]."""
        return functional.pixel_unshuffle(images_to_pixels(images), self.factor)

    def sample(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The latents themselves, in float32."""
        return moments.float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to pixels [B, C, H, W] in [-1, 1]."""
        return functional.pixel_shuffle(latents, self.factor)

    def lipschitz_bound(self, side: int) -> float | None:
        """Decoding only moves numbers, so it keeps distances."""
        return 1.0


def load_space_to_depth(options: AutoencoderOptions, channels: int) -> SpaceToDepth:
    """The loader that `--pretrained_autoencoder_ckpt space_to_depth` calls; `channels` are the images'."""
    return SpaceToDepth(channels)


AUTOENCODERS["space_to_depth"] = load_space_to_depth


# A dataset.


def open_stripes(name: str, datadir: Path, split: Split, image_size: int) -> ImageDataset:
    """Gray stripes of random width and phase, horizontal (class 0) or vertical (class 1): 64 images, 32 held out."""
    count, seed = (64, 0) if split == "train" else (32, 1)
    widths, phases = np.random.default_rng(seed).uniform([[3], [0]], [[9], [6.3]], (2, count))

    def read(index: int) -> torch.Tensor:
        wave = np.sin(2 * np.pi * np.arange(image_size) / widths[index] + phases[index])
        image = np.broadcast_to(wave[:, None], (image_size, image_size))
        grey = (127.5 * (1 + (image.T if index % 2 else image))).astype(np.uint8)
        return torch.from_numpy(grey)[None]  # uint8 [1, H, W]

    facts = DatasetFacts(name, image_size, channels=1, crop=None, flips=True, class_names=("horizontal", "vertical"))
    return ImageDataset(facts, split, np.arange(count) % 2, read, fingerprint=f"stripes {split} {count}")


DATASETS["stripes"] = open_stripes


# A solver.


def ralston(
    velocity: Velocity, x: torch.Tensor, times: Sequence[float], options: SolverOptions, draw: Draw
) -> Solution:
    """Ralston's second-order method, which minimizes the bound on the local error (Ralston 1962).

    Args:
        velocity: velocity(t, x) -> dx/dt.
        x: points [B, C, h, w] at times[0].
        times: step boundaries, from 1 (noise) to 0 (data) or the reverse.
        options: the solver's options.
        draw: noise like x, for stochastic methods.
    """
    for start, end in pairwise(times):
        step = end - start
        first = velocity(time_tensor(start, x), x)
        second = velocity(time_tensor(start + 2 / 3 * step, x), x + 2 / 3 * step * first)
        x = x + step * (first / 4 + 3 / 4 * second)
    return solution_with_count(x, evaluations=2 * (len(times) - 1))


SOLVERS["ralston"] = Method(ralston)


# Shared code.

ROOT = Path(__file__).parents[1]
# The entries registered above are removed again, so that other tests see only the project's. `registered` restores them.
ADDED = [
    (registry, name, registry.pop(name))
    for registry, name in [
        (NETWORKS, "convnet"),
        (OBJECTIVES, "pseudo_huber"),
        (AUTOENCODERS, "space_to_depth"),
        (DATASETS, "stripes"),
        (SOLVERS, "ralston"),
    ]
]
EXAMPLES = {
    "a network": {"model_type": "convnet", "conv_width": 16},
    "an objective": {"objective": "pseudo_huber", "huber_scale": 0.3},
    "an autoencoder": {"pretrained_autoencoder_ckpt": "space_to_depth"},
    "a dataset": {"dataset": "stripes"},
    "a solver": {"method": "ralston"},
}
PLAIN = {
    "dataset": "stripes", "image_size": 16, "pretrained_autoencoder_ckpt": "none", "model_type": "DiT-Extending/4",
    "num_classes": 2, "label_dropout": 0.1, "batch_size": 8, "method": "euler", "num_steps": 2, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def registered(monkeypatch):
    """Register the examples, as importing their files would."""
    for registry, name, entry in ADDED:
        monkeypatch.setitem(registry, name, entry)


@pytest.fixture
def small_dit(monkeypatch):
    """A small DiT for the examples that do not define a network."""
    monkeypatch.setitem(DIT_SIZES, "Extending", (16, 1, 2))
    monkeypatch.setitem(NETWORKS, "DiT-Extending/4", Family(DiTOptions, partial(build_dit, "Extending", 4)))


def words_of(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def train(flags, **others):
    options = parse_options("", training_groups(), words_of(flags | others))
    return run_training(GENERATION, options, Processes())


@pytest.mark.usefixtures("registered", "small_dit", "process_restored")
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_trains_saves_resumes_and_samples(tmp_path, example):
    flags = PLAIN | EXAMPLES[example] | {"save_root": tmp_path, "datadir": tmp_path}
    folder = tmp_path / "latent_flow" / "stripes"
    assert train(flags, exp="whole", max_steps=2) == 0
    assert train(flags, exp="parts", max_steps=1) == 0
    assert train(flags, exp="parts", max_steps=2, resume=True) == 0
    whole, parts = (torch.load(folder / exp / "content.pth", weights_only=True) for exp in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 2
    for name, weight in whole["network"].items():
        assert torch.equal(weight, parts["network"][name]), name  # resuming is exact
    header = read_weights(folder / "whole" / "best.safetensors")[1]
    found = {"model_type": header.model_type, "objective": header.objective, "dataset": header.dataset.name}
    found |= {"pretrained_autoencoder_ckpt": header.autoencoder.id}
    for name, value in found.items():
        assert value == flags.get(name, "flow_matching")
    names = {"dataset", "datadir", "method", "num_steps", "device", "save_root"}
    sampling = {name: value for name, value in flags.items() if name in names}
    words = words_of(sampling | {"exp": "whole", "n_sample": 4, "batch_size": 4, "output_dir": tmp_path / "out"})
    (result,) = run_modes(parse_options("", mode_groups(), words))
    assert result["samples"] == 4
    assert Path(result["grid"]).is_file()


def test_the_document_has_exactly_these_examples():
    """Each code block in docs/extending.md appears in this file, and the document has a block for each example here."""
    document = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(blocks) == len(EXAMPLES)
    for block in blocks:
        body = re.sub(r"\A(from [^\n]*\n|import [^\n]*\n|    [^\n]*\n|\)\n|\n)*", "", block)  # remove the imports
        assert body in source, body[:200]
        assert 20 <= len(block.splitlines()) <= 60
