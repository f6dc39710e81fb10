"""A trained network next to the exact velocity of the latents that it was trained on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints.files import load_model
from checkpoints.header import Header
from command_line import leading_word, parse_options
from datasets_prep.datasets import (
    HELD_OUT_IMAGES,
    DatasetOptions,
    FlipOptions,
    ImageDataset,
    choose_flips,
    open_dataset,
)
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import MomentSource, open_moments
from flow.empirical import Components, EmpiricalVelocity
from flow.flow_maps.options import guides_targets
from flow.guidance import Network
from flow.losses.contrast import correct
from flow.losses.options import LossOptions
from flow.objectives import OBJECTIVES
from flow.paths import straight_path
from models.autoencoders.protocol import Autoencoder
from models.conditions import Condition
from options import UsageError, as_json, option
from runtime.distributed import Processes
from runtime.files import write_json
from runtime.messages import fact, note, show_result
from runtime.outputs import check_folder
from runtime.plots import require_plots
from runtime.precision import DeviceOptions, Machine, choose_device
from runtime.randomness import generator_for
from runtime.weights import list_names

__all__ = [
    "DataFolderOptions",
    "ExactPoints",
    "Latents",
    "TrainedFlow",
    "check_exact_velocity",
    "exact_velocity",
    "measure_checkpoint",
    "open_trained_flow",
    "posterior",
]

TIMES = 32  # of ExactPoints
BATCH = 256
NUMBERS_PER_PART = 1 << 22  # of each part of the mixture; 32 MiB in float64


@dataclass(frozen=True)
class DataFolderOptions:
    """Data."""

    datadir: str = option("./data", "directory of the dataset's files and latent caches", common=True)


class Latents(NamedTuple):
    """Latents of images, with noise for them.

    Args:
        data: posterior samples, as training draws them [N, c, h, w].
        noise: standard normal, like `data`.
        labels: the network's class ids [N].
        indices: indices of the images [N].
        mirrored: whether they are of the mirror image [N].
    """

    data: torch.Tensor
    noise: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    mirrored: torch.Tensor


@dataclass(frozen=True)
class TrainedFlow:
    """A network in float32, its autoencoder, and posterior moments of its training images and of held-out images."""

    path: str
    header: Header
    network: Network
    autoencoder: Autoencoder
    dataset: ImageDataset
    training: MomentSource
    held_out: MomentSource
    device: torch.device

    def exact(self, bandwidth: float = 0.0) -> EmpiricalVelocity:
        """The exact velocity of the training latents, smoothed by normal noise of standard deviation `bandwidth`."""
        return exact_velocity(self.header, self.training, self.autoencoder, self.device, bandwidth)

    def draw(self, source: MomentSource, count: int, generator: torch.Generator) -> Latents:
        """Draw latents of a source's images, and of their mirror images if training used them; see `draw_latents`."""
        flips = self.header.dataset.flips
        return draw_latents(source, self.autoencoder, count, generator, self.device, self.header.num_classes, flips)

    def describe(self) -> dict[str, Any]:
        """The first entries of every result."""
        return {
            "checkpoint": self.path,
            "step": self.header.step,
            "weights_sha256": self.header.weights_sha256,
            "autoencoder": as_json(self.autoencoder.describe()),
            "dataset": self.header.dataset.name,
            "images": len(self.training),
        }

    def condition(self, labels: torch.Tensor) -> Condition:
        """The condition of labels [B]; label K is the null class."""
        return Condition(labels)


def measure_checkpoint(
    documentation: str,
    options_type: type[Any],
    name: str,
    measure: Callable[[TrainedFlow, Any], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None],
) -> None:
    """Run a script that measures the checkpoint named on the command line: print the result, and write JSON and a plot.

    Args:
        documentation: of the script.
        options_type: dataclass of its options, with `output_dir`.
        name: end of the files' names.
        measure: computes the result.
        describe: the lines to print.
        plot: draws the result into a PNG file.

    Raises:
        UsageError: the checkpoint or its data cannot be read, the files cannot be written, or matplotlib is missing.
    """
    checkpoint, words = leading_word("CHECKPOINT, a model_*.safetensors file")
    groups = [options_type, DataFolderOptions, LatentCacheOptions, DeviceOptions]
    options = parse_options(documentation, groups, words, positional="CHECKPOINT")
    own = options[options_type]
    folder = Path(own.output_dir or Path(checkpoint).parent / "samples")
    require_plots()
    device = choose_device(options[DeviceOptions])
    flow = open_trained_flow(checkpoint, options[DataFolderOptions], options[LatentCacheOptions], device)
    check_folder(folder, "--output_dir")
    result = {**flow.describe(), **measure(flow, own)}
    show_result(describe(result))
    stem = folder / f"{Path(checkpoint).stem}_{name}"
    write_json(f"{stem}.json", result)
    plot(result, Path(f"{stem}.png"))
    fact("written", f"{stem}.json, {stem}.png")


def open_trained_flow(
    checkpoint: str, data: DataFolderOptions, cache: LatentCacheOptions, device: torch.device
) -> TrainedFlow:
    """Load a checkpoint and its dataset's latents. Without a latent cache, this encodes the images first.

    Raises:
        UsageError: the checkpoint cannot be read, its exact velocity is not known, or the dataset is missing or has other
            classes.
    """
    model = load_model(checkpoint, device)
    header = model.header
    check_exact_velocity(header, checkpoint)
    own = DatasetOptions(header.dataset.name, data.datadir, header.dataset.image_size)
    flips = FlipOptions("on" if header.dataset.flips else "off")
    training = choose_flips(open_dataset(own, "train"), flips)
    _check_classes(training, header)
    held_out = open_dataset(own, "validation").head(HELD_OUT_IMAGES)
    machine = Machine(device, "fp32")
    sources = [open_moments(each, model.autoencoder, own, cache, machine) for each in (training, held_out)]
    objective = OBJECTIVES[header.objective].build(header.path)
    network = correct(objective.velocity(model.network.requires_grad_(False)), header.correction(device))
    return TrainedFlow(checkpoint, header, network, model.autoencoder, training, sources[0], sources[1], device)


def _check_classes(dataset: ImageDataset, header: Header) -> None:
    """Check that labels mean the same in the dataset as in training, if both have class names.

    Raises:
        UsageError: the class names differ, so the network was trained on other images.
    """
    trained, found = header.dataset.class_names, dataset.facts.class_names
    if trained and found and trained != found:
        raise UsageError(
            f"the classes of {dataset.facts.name} in --datadir are {list_names(found)}, but the checkpoint was trained on "
            f"{list_names(trained)}: name the folder of its training images with --datadir"
        )


def check_exact_velocity(header: Header, subject: str) -> None:
    """Check that the velocity with the least loss on the training latents is known; print a note if a loss term moves it.

    Args:
        header: of the checkpoint or run.
        subject: the checkpoint or option that needs it, for the message.

    Raises:
        UsageError: it is not known.
    """
    if header.dense is not None:
        raise UsageError(
            f"{subject} was trained for {header.task}: the exact velocity given a dense condition is not known, so this "
            "needs a network without one"
        )
    if header.path.coupling != "independent":
        raise UsageError(
            f"{subject} was trained with --coupling {header.path.coupling}: the exact velocity is known for independent noise "
            "only"
        )
    if guides_targets(header.path) or not OBJECTIVES[header.objective].keeps_velocity:
        raise UsageError(
            f"{subject} was trained with --objective {header.objective}"
            + (" and guidance in its targets" if guides_targets(header.path) else "")
            + ": its velocity is not the exact one of the training latents"
        )
    if isinstance(header.path, LossOptions) and header.path.velocity_direction:
        note(
            "--velocity_direction moves the best velocity away from the exact one, so the excess loss does not reach 0"
        )


def draw_latents(
    source: MomentSource,
    autoencoder: Autoencoder,
    count: int,
    generator: torch.Generator,
    device: torch.device,
    num_classes: int,
    flips: bool,
) -> Latents:
    """Draw images, each at most once if there are enough, samples of their posteriors, and noise.

    Args:
        source: posterior moments.
        autoencoder: samples the posteriors.
        count: number of images N.
        generator: the random numbers, on the CPU.
        device: of the result.
        num_classes: the network's number of classes; with 1, all labels are 0.
        flips: mirror images with probability 1/2.
    """
    rounds = -(-count // len(source))
    indices = torch.cat([torch.randperm(len(source), generator=generator) for _ in range(rounds)])[:count]
    mirrored = (torch.rand(count, generator=generator) < 0.5) & flips
    mean, std = posterior(autoencoder, source.moments(indices, mirrored).to(device))
    own, noise = (torch.randn(mean.shape, generator=generator).to(device) for _ in range(2))
    labels = source.labels[indices] if num_classes > 1 else torch.zeros(count, dtype=torch.long)
    return Latents(mean + std * own, noise, labels.to(device), indices, mirrored)


@dataclass(frozen=True)
class ExactPoints:
    """Fixed points on the path of training images with the exact velocity there, to measure networks by.

    Args:
        count: number of points of all processes.
        times, x_t, velocity, labels: of this process's points.
    """

    count: int
    times: torch.Tensor
    x_t: torch.Tensor
    velocity: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def draw(
        cls,
        header: Header,
        source: MomentSource,
        autoencoder: Autoencoder,
        count: int,
        device: torch.device,
        processes: Processes,
    ) -> "ExactPoints":
        """Draw `count` points at evenly spaced times, always the same ones, and compute the exact velocity of a share."""
        generator = generator_for(0, "exact points")
        latents = draw_latents(source, autoencoder, count, generator, device, header.num_classes, header.dataset.flips)
        rows = torch.arange(processes.rank, count, processes.count, device=device)
        grid = (torch.arange(TIMES, device=device) + 0.5) / TIMES
        times = grid[torch.arange(count, device=device) % TIMES][rows]
        x_t, _ = straight_path(times, latents.data[rows], latents.noise[rows], header.path.sigma_min)
        labels = latents.labels[rows]
        exact = exact_velocity(header, source, autoencoder, device)
        return cls(count, times, x_t, exact(times, x_t, Condition(labels)), labels)

    @torch.no_grad()
    def excess(self, network: Network, processes: Processes) -> float:
        """The mean squared distance of the network's velocity from the exact one, per dimension."""
        parts = zip(*(each.split(BATCH) for each in (self.times, self.x_t, self.labels, self.velocity)), strict=True)
        total = torch.zeros((), dtype=torch.float64)
        for t, x, labels, exact in parts:
            error = (network(t, x, Condition(labels)).float() - exact).square().flatten(1).mean(1)
            total += error.double().sum().cpu()
        return processes.sum(total).item() / self.count


def exact_velocity(
    header: Header, source: MomentSource, autoencoder: Autoencoder, device: torch.device, bandwidth: float = 0.0
) -> EmpiricalVelocity:
    """The velocity that minimizes the flow matching loss on the images of `source`, and on their mirror images if used.

    Every posterior is one component, because training samples it afresh in each step.
    """
    return EmpiricalVelocity(
        partial(_components, source, autoencoder, device, header.dataset.flips),
        classes=header.num_classes,
        sigma_min=header.path.sigma_min,
        bandwidth=bandwidth,
    )


def posterior(autoencoder: Autoencoder, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the scaled latents [B, c, h, w]; the latter is 0 without a posterior."""
    mean = autoencoder.sample(moments)
    return mean, autoencoder.sample(moments, torch.ones_like(mean)) - mean


def _components(
    source: MomentSource, autoencoder: Autoencoder, device: torch.device, flips: bool
) -> Iterator[Components]:
    size = source.moments(torch.tensor([0]), torch.tensor([False])).numel()
    for indices in torch.arange(len(source)).split(max(1, NUMBERS_PER_PART // size)):
        labels = source.labels[indices].to(device)
        for mirrored in (False, True)[: 1 + flips]:
            moments = source.moments(indices, torch.full((len(indices),), mirrored))
            yield Components(*posterior(autoencoder, moments.to(device)), labels)
