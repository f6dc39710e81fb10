"""Training of a small AutoencoderKL (Kingma & Welling 2014; Rombach et al. 2022) for a dataset without a pretrained one.

The loss is the mean squared error of the decoded posterior sample, plus a small weight times the Kullback-Leibler (KL)
divergence of the posterior from the standard normal.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from datasets_prep.datasets import DatasetFacts, ImageDataset
from models.autoencoders.kl import LOGVAR_RANGE, KLAutoencoder, decode_pixels, encode_moments, new_autoencoder_kl
from models.autoencoders.pixels import images_to_pixels
from options import UsageError, option
from runtime.files import replace_folder, write_json
from runtime.messages import show, warn
from runtime.outputs import check_folder
from runtime.precision import Machine
from runtime.progress import progress_bar
from runtime.randomness import generator_for
from training.ema import Ema
from training.nan_guard import check_loss, check_trained
from training.schedules import SCHEDULES, learning_rate

__all__ = [
    "AutoencoderTrainingOptions",
    "check_output",
    "posterior_statistics",
    "save_autoencoder",
    "snapshot_folder",
    "train_autoencoder",
]

SAVE_EVERY = 1000  # steps between snapshots


@dataclass(frozen=True)
class AutoencoderTrainingOptions:
    """Autoencoder training."""

    output: str = option("autoencoder", "output folder, in diffusers format")
    widths: tuple[int, ...] = option(
        (16, 32, 64), "channels of each level (multiples of 8); each level after the first halves the resolution"
    )
    latent_channels: int = option(4, "channels of the latents", minimum=1)
    image_channels: int | None = option(
        None, "input channels; default: the dataset's; 3 repeats the channel of gray images", minimum=1
    )
    kl_weight: float = option(
        1e-6, "weight of the KL divergence per image; the mean squared error has weight 1", minimum=0
    )
    batch_size: int = option(32, "images per step", minimum=1)
    max_steps: int = option(10000, "optimizer steps", minimum=1)
    lr: float = option(2e-3, "learning rate", minimum=0)
    lr_schedule: str = option("trapezoid", "learning-rate schedule", choices=SCHEDULES)
    ema_decay: float = option(
        0.999, "decay of the exponential moving average (EMA) of the weights, which is saved", minimum=0
    )
    seed: int = option(0, "seed of the initial weights, the data order and the posterior samples")
    half_weights: bool = option(True, "store the weights in float16, which halves the file size")


def train_autoencoder(dataset: ImageDataset, options: AutoencoderTrainingOptions, machine: Machine) -> nn.Module:
    """Train on all images of `dataset`.

    Returns:
        The AutoencoderKL with its EMA weights, rounded to the precision of the saved file.

    Raises:
        UsageError: the image size, widths, channels or batch size do not fit the dataset.
        DivergedError: the loss is not finite.
    """
    facts = dataset.facts
    channels = _choose_channels(facts, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = new_autoencoder_kl(channels, options.widths, options.latent_channels, facts.image_size, {})
    network = network.to(machine.device).to(memory_format=torch.channels_last)
    ema = Ema(network, options.ema_decay)
    optimizer = torch.optim.AdamW(network.parameters(), options.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    border = 0 if facts.crop is None else (facts.image_size - facts.crop) // 2
    noise_source = generator_for(options.seed, "posterior", device=machine.device)
    batches = _shuffled_batches(dataset, options.batch_size, options.seed, machine.device)

    progress = progress_bar(range(options.max_steps), desc="autoencoder", unit="step")
    started = time.perf_counter()
    for step in progress:
        rate = learning_rate(options.lr_schedule, options.lr, step, options.max_steps, warmup=100)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels = next(batches).expand(-1, channels, -1, -1)
        with machine.autocast():
            error, divergence = _losses(network, pixels, border, noise_source)
        loss = error + options.kl_weight * divergence
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        ema.update(network)
        if (step + 1) % SAVE_EVERY == 0:
            _save_snapshot(ema.network, options)
        if step % 100 == 0:
            check_loss(loss.item(), step)
            psnr = 10 * torch.log10(4 / error.detach()).item()
            progress.set_postfix(psnr=f"{psnr:.1f} dB", kl=f"{divergence.item():.0f}", refresh=False)
    check_loss(loss.item(), options.max_steps)
    seconds = time.perf_counter() - started
    show(f"trained {options.max_steps} steps of {options.batch_size} images in {seconds / 60:.1f} min")
    return ema.network.half().float() if options.half_weights else ema.network


def posterior_statistics(network: nn.Module, dataset: ImageDataset, machine: Machine) -> dict[str, list[float]]:
    """Compute the mean and standard deviation of posterior *samples* per channel, as latents_mean and latents_std.

    The variance of samples is the variance of the posterior means plus the mean of the posterior variances. A channel that
    the autoencoder does not use (mean 0, variance 1) is therefore not amplified.
    """
    autoencoder = KLAutoencoder(network, "unsaved", scale_factor=1.0).to(machine.device)
    count, total, square, variance = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for start in progress_bar(range(0, len(dataset), 512), desc="latent statistics", unit="batch"):
        images = torch.stack([dataset[i] for i in range(start, min(start + 512, len(dataset)))])
        mean, logvar = autoencoder.encode(images.to(machine.device)).cpu().double().chunk(2, dim=1)
        count += mean.shape[0] * mean.shape[2] * mean.shape[3]
        total = total + mean.sum((0, 2, 3))
        square = square + mean.square().sum((0, 2, 3))
        variance = variance + logvar.exp().sum((0, 2, 3))
    center = total / count
    spread = (square / count - center.square() + variance / count).sqrt()
    return {"latents_mean": center.tolist(), "latents_std": spread.tolist()}


def snapshot_folder(options: AutoencoderTrainingOptions) -> Path:
    """The folder for snapshots of the weights until the finished autoencoder is saved."""
    return Path(f"{options.output}.snapshot")


def _choose_channels(facts: DatasetFacts, options: AutoencoderTrainingOptions) -> int:
    """The network's image channels, after a check that the options fit the images."""
    if facts.image_size % 2 ** (len(options.widths) - 1):
        raise UsageError(
            f"--image_size {facts.image_size} cannot be halved {len(options.widths) - 1} times, as the "
            f"{len(options.widths)} --widths require: choose another size, or fewer widths"
        )
    if any(width < 8 or width % 8 for width in options.widths):
        raise UsageError(f"--widths {' '.join(map(str, options.widths))}: expected multiples of 8")
    channels = options.image_channels or facts.channels
    if channels not in (facts.channels, 3) or facts.channels not in (channels, 1):
        raise UsageError(
            f"--image_channels {channels} does not fit images with {facts.channels} channels: expected the same number, "
            "or 3 for gray images"
        )
    return channels


def _save_snapshot(network: nn.Module, options: AutoencoderTrainingOptions) -> None:
    """Save the network in case of a crash. Training can do without."""
    try:
        save_autoencoder(network, snapshot_folder(options), {}, options)
    except OSError as error:
        warn(f"cannot write the snapshot {error.filename} ({error.strerror}); training goes on")


def check_output(folder: str | Path) -> None:
    """Check that saving to `folder` is possible, and replaces nothing other than an autoencoder.

    Raises:
        UsageError: the folder exists and is not an autoencoder, or its parent cannot be written.
    """
    if Path(folder).exists() and not (Path(folder) / "diffusion_pytorch_model.safetensors").is_file():
        raise UsageError(f"--output {folder} exists and is not an autoencoder: name a new folder")
    check_folder(Path(folder).parent, "--output")


def save_autoencoder(
    network: nn.Module, folder: str | Path, statistics: dict[str, list[float]], options: AutoencoderTrainingOptions
) -> None:
    """Save in diffusers format (`save_pretrained`), with the training options. The folder is replaced atomically.

    Raises:
        DivergedError: weights are not finite, perhaps only in float16.
    """
    stored: Any = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    if statistics:  # diffusers applies scaling_factor next to them
        stored.register_to_config(scaling_factor=1.0, **statistics)
    if options.half_weights:
        stored.half()
    check_trained(stored, "autoencoder")
    with replace_folder(folder) as temporary:
        stored.save_pretrained(temporary)
        write_json(temporary / "training.json", options)


def _losses(
    network: nn.Module, pixels: torch.Tensor, border: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of the images without their padding, and mean KL divergence per image."""
    mean, logvar = encode_moments(network, pixels).float().chunk(2, dim=1)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    decoded = decode_pixels(network, mean + (0.5 * logvar).exp() * noise).float()
    height, width = pixels.shape[2] - border, pixels.shape[3] - border
    inside = (slice(None), slice(None), slice(border, height), slice(border, width))
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    return functional.mse_loss(decoded[inside], pixels[inside]), divergence


def _shuffled_batches(
    dataset: ImageDataset, batch_size: int, seed: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield batches of pixels endlessly. Every epoch has a new random order, and random mirroring if the dataset flips."""
    if len(dataset) < batch_size:
        raise UsageError(
            f"--batch_size {batch_size} is larger than the dataset of {len(dataset)} images: choose a smaller one"
        )
    epoch = 0
    while True:
        generator = generator_for(seed, "order", epoch)
        order = torch.randperm(len(dataset), generator=generator)
        for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
            images = torch.stack([dataset[int(i)] for i in chosen])
            if dataset.facts.flips:
                mirrored = torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5
                images = torch.where(mirrored, images.flip(3), images)
            yield images_to_pixels(images).to(device, memory_format=torch.channels_last)
        epoch += 1
