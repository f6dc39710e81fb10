"""Checks that a network from another project's file is read by its own conventions: time, sign and scale of latents.

Such a file records none of them, and a wrong one only shows in bad samples. On data d, noise n and x_t = (1 - t) d + t n, the
network's velocity v explains the share 1 - E|v - (n - d)|^2 / E|n - d|^2 of the true one. Three facts are checked:

    scale      latents have a standard deviation of about 1 and a mean of about 0
    direction  v(t, x_t) has a smaller error than -v(t, x_t), v(1 - t, x_t) and -v(1 - t, x_t)
    fit        v explains more than the best multiple of x_t does, which every trained network could learn

With the dataset's images, d are their latents. Without them, d are the network's own samples after a few steps. A wrong
velocity leads to points far from those that it was trained on, so it hardly explains more there than x_t does. The scale of
samples is judged by whether they keep it when they are decoded and encoded.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.files import LoadedModel
from checkpoints.header import Header
from datasets_prep.datasets import DatasetOptions, ImageDataset, open_dataset
from flow.guidance import Network
from flow.objectives import OBJECTIVES
from flow.solvers import SolverOptions, Velocity, solve
from models.autoencoders.pixels import decode_images
from models.autoencoders.protocol import Autoencoder
from models.conditions import Condition
from options import UsageError
from runtime.messages import note, warn
from runtime.precision import Machine
from runtime.randomness import generator_for
from sampling.request import SamplerRequest

__all__ = ["Subject", "check_file", "find_fault", "warn_of_conventions"]

# Not 1/2, where both directions of time agree, and noisy enough for networks to differ from a multiple of x_t.
TIME = 0.7
IMAGES, SAMPLES = 8, 4  # so that a network is evaluated for 16 images, or for 32 of its own samples
SOLVER = SolverOptions("heun", 3)  # samples by coarser solvers have too small a scale
# Stable Diffusion's scaled latents of ImageNet have 0.73, and a mean of 0.64 (root mean square over channels).
SMALLEST_STD, LARGEST_STD, LARGEST_MEAN = 0.4, 1.8, 1.5
LARGEST_RETURN = 1.8  # factor by which standard deviations of samples may change by decoding and encoding
BETTER = 0.8  # share of the error that another direction must have to be believed
# Least reduction of the error of the best multiple of x_t. A network trained on Fashion-MNIST reached 0.34 on images, and 0.39
# on its samples; -0.35 and -0.17 on images in three times the scale and with permuted channels; and at most 0.09 on its samples
# in another direction.
LEAST_GAIN_ON_IMAGES, LEAST_GAIN_ON_SAMPLES = -0.05, 0.15

DIRECTIONS = {
    "sign": "with the opposite sign",
    "time": "at the reversed time 1 - t",
    "both": "with the opposite sign at the reversed time 1 - t, by which SiT and LightningDiT differ from other projects",
}
ADVICE = "that the network was trained with this autoencoder and this --scale_factor or these latent statistics"


@dataclass(frozen=True)
class Subject:
    """A network to check.

    Args:
        velocity: velocity(t [B], x [B, c, h, w], condition) as this project defines it, towards noise at t = 1.
        autoencoder: of the network's latents.
        latent_shape: (c, h, w).
        num_classes: K; 1 means unconditional.
        device: of the network and the autoencoder.
    """

    velocity: Network
    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]
    num_classes: int
    device: torch.device

    @classmethod
    def of(cls, header: Header, network: Network, autoencoder: Autoencoder, machine: Machine) -> "Subject":
        """The network of a checkpoint or a run with this header, in evaluation mode, in the machine's precision."""
        velocity = OBJECTIVES[header.objective].build(header.path).velocity(network)

        def evaluate(t: torch.Tensor, x: torch.Tensor, condition: Condition) -> torch.Tensor:
            with machine.autocast():
                return velocity(t, x, condition)

        return cls(evaluate, autoencoder, header.latent_shape, header.num_classes, machine.device)


def check_file(path: Path, request: SamplerRequest, model: LoadedModel, machine: Machine) -> None:
    """Warn if the network in a file is read by wrong conventions, as far as --check_conventions asks for it.

    Held-out images are read if --datadir was given, so that no dataset is searched for this check alone.

    Args:
        path: the file.
        request: the request to sample from it.
        model: its network and autoencoder; the network is not compiled yet.
        machine: device and precision.
    """
    header, asked = model.header, request.source.check_conventions
    wanted = asked == "on" or (asked == "auto" and header.published_file is not None)
    if not wanted:
        return
    if header.dense is not None:
        if asked == "on":
            note("--check_conventions does not check networks for inpainting or label maps")
        return
    dataset = None
    if "datadir" in request.given:
        stored = header.dataset
        with suppress(UsageError):
            data = DatasetOptions(stored.name, request.given["datadir"], stored.image_size)
            dataset = open_dataset(data, "validation")
    warn_of_conventions(str(path), Subject.of(header, model.network, model.autoencoder, machine), dataset)


def warn_of_conventions(source: str, subject: Subject, dataset: ImageDataset | None) -> None:
    """Warn if the network or its latents do not follow the conventions; `source` names its file.

    Args:
        source: the file.
        subject: the network.
        dataset: images like those that the network was trained on. Without readable images, its own samples are used.
    """
    if fault := find_fault(subject, dataset):
        warn(f"{source}: {fault}")


@torch.no_grad()
def find_fault(subject: Subject, dataset: ImageDataset | None) -> str:
    """Describe a fault of the network or its latents, and what to do; "" if there is none. See `warn_of_conventions`."""
    with suppress(UsageError):  # unreadable images
        if dataset is not None and dataset.has_images:
            return _judge_images(subject, dataset)
    return _judge_samples(subject)


def _judge_images(subject: Subject, dataset: ImageDataset) -> str:
    count = min(IMAGES, len(dataset))
    chosen = [number * len(dataset) // count for number in range(count)]
    images = torch.stack([dataset[index] for index in chosen]).to(subject.device)
    labels = dataset.labels[chosen] % subject.num_classes
    data = subject.autoencoder.sample(subject.autoencoder.encode(images))
    if not subject.autoencoder.is_pixel_space and (fault := _fault_of_scale(data)):
        return fault
    fit = _Fit.measure(subject, data, labels)
    return fit.fault_of_direction() or fit.fault(LEAST_GAIN_ON_IMAGES, f"the latents of {count} images")


def _judge_samples(subject: Subject) -> str:
    labels = torch.arange(SAMPLES) % subject.num_classes
    condition, noise = Condition(labels.to(subject.device)), _noise(subject, SAMPLES, "samples")
    velocity = _at_one_time(subject.velocity, condition)
    data = solve(velocity, noise, SOLVER).x
    fit = _Fit.measure(subject, data, labels)
    if fault := fit.fault(LEAST_GAIN_ON_SAMPLES, "its own samples"):  # which do not show which direction is right
        return fault
    return "" if subject.autoencoder.is_pixel_space else _fault_of_return(subject, data)


def _fault_of_scale(data: torch.Tensor) -> str:
    """A wrong standard deviation or mean of latents [B, c, h, w]; "" if both are plausible."""
    std = data.var(dim=(0, 2, 3)).mean().sqrt().item()
    mean = data.mean(dim=(0, 2, 3)).square().mean().sqrt().item()
    if SMALLEST_STD <= std <= LARGEST_STD and mean <= LARGEST_MEAN:
        return ""
    return (
        f"the scaled latents of {len(data)} images have the standard deviation {std:.2g} and the mean {mean:.2g}, but networks "
        f"are trained on about 1 and 0: check {ADVICE}"
    )


def _fault_of_return(subject: Subject, data: torch.Tensor) -> str:
    """A wrong scale of samples [B, c, h, w]; "" if they keep it after decoding and encoding."""
    autoencoder = subject.autoencoder
    returned = autoencoder.sample(autoencoder.encode(decode_images(autoencoder, data)[0]))
    factor = (returned.std() / data.std()).item()
    if 1 / LARGEST_RETURN <= factor <= LARGEST_RETURN:
        return ""
    before, after = data.std().item(), returned.std().item()
    return (
        f"the standard deviation of its samples changes from {before:.2g} to {after:.2g} when they are decoded and encoded: "
        f"check {ADVICE}"
    )


@dataclass(frozen=True)
class _Fit:
    """Relative errors: of the velocity as it is (""), in each of the DIRECTIONS, and of the best multiple of x_t."""

    errors: dict[str, float]
    multiple: float

    @classmethod
    def measure(cls, subject: Subject, data: torch.Tensor, labels: torch.Tensor) -> "_Fit":
        """Measure on data [B, c, h, w] with class ids [B], in one evaluation of a batch of 2 B."""
        noise = _noise(subject, len(data), "fit")
        x, true = (1 - TIME) * data + TIME * noise, noise - data
        times = torch.tensor([TIME, 1 - TIME], device=x.device).repeat_interleave(len(x))
        condition = Condition(labels.to(x.device).repeat(2))
        given, reversed_ = subject.velocity(times, torch.cat([x, x]), condition).float().chunk(2)
        found = {"": given, "sign": -given, "time": reversed_, "both": -reversed_}
        whole = true.square().mean()
        errors = {name: ((v - true).square().mean() / whole).item() for name, v in found.items()}
        return cls(errors, (1 - (x * true).mean() ** 2 / (x.square().mean() * whole)).item())

    def fault_of_direction(self) -> str:
        """A direction of time or sign with a clearly smaller error; "" if there is none."""
        best = min(self.errors, key=lambda name: self.errors[name])
        if not best or not self.errors[best] < BETTER * self.errors[""]:
            return ""
        return (
            f"the network's velocities explain {_percent(self.errors[''])} of noise - data, but {_percent(self.errors[best])} "
            f"{DIRECTIONS[best]}. The file follows another convention than it was read with, so samples will be noise: give "
            "the --model_type of the project that it comes from"
        )

    def fault(self, least_gain: float, subject: str) -> str:
        """Whether v reduces the error of the best multiple of x_t by less than the share `least_gain`, as a message or ""."""
        if self.errors[""] <= (1 - least_gain) * self.multiple:  # False for NaN
            return ""
        return (
            f"on {subject}, the network's velocities explain {_percent(self.errors[''])} of noise - data, and a multiple of "
            f"x_t {_percent(self.multiple)}. Trained networks explain more: the file may follow another convention of time and "
            "sign, hold untrained weights, or belong to other latents. Check that --model_type fits the file's project, and "
            f"{ADVICE}"
        )


def _noise(subject: Subject, count: int, stream: str) -> torch.Tensor:
    """Standard normal [count, c, h, w] that depends on the stream's name only, and leaves torch's global generator alone."""
    generator = generator_for("conventions", stream)
    return torch.randn(count, *subject.latent_shape, generator=generator).to(subject.device)


def _at_one_time(velocity: Network, condition: Condition) -> Velocity:
    return lambda t, x: velocity(t.expand(len(x)), x, condition).float()


def _percent(error: float) -> str:
    return "nothing" if not math.isfinite(error) or error >= 1 else f"{100 * (1 - error):.0f} %"
