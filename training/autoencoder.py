"""Training of a small AutoencoderKL (Kingma & Welling 2014; Rombach et al. 2022) for a dataset without a pretrained one.

models/autoencoders/training_loss.py defines the loss: the mean squared error of the decoded posterior sample, plus a small
weight times the Kullback-Leibler (KL) divergence of the posterior from the standard normal, and optional terms.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets_prep.datasets import DatasetFacts, ImageDataset
from models.autoencoders.diffusers_files import load_network
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import images_to_pixels
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.autoencoders.statistics import measure_statistics
from models.autoencoders.training_loss import AutoencoderLossOptions, LossStreams, autoencoder_losses
from options import UsageError, option
from runtime.files import replace_folder, write_json
from runtime.messages import show, warn
from runtime.outputs import check_folder
from runtime.precision import Machine
from runtime.progress import progress_bar
from runtime.randomness import generator_for
from runtime.weights import find_mismatch
from training.ema import Ema
from training.nan_guard import check_loss, check_trained
from training.optimizers import Muon
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
OUTER_LAYERS = ("conv_in", "conv_out", "quant_conv")  # next to images or latents; never trained by Muon


@dataclass(frozen=True)
class AutoencoderTrainingOptions(AutoencoderLossOptions):
    """Autoencoder training."""

    output: str = option("autoencoder", "output folder, in diffusers format")
    widths: tuple[int, ...] = option(
        (16, 32, 64), "channels of each level (multiples of 8); each level after the first halves the resolution"
    )
    latent_channels: int = option(4, "channels of the latents", minimum=1)
    image_channels: int | None = option(
        None, "input channels; default: the dataset's; 3 repeats the channel of gray images", minimum=1
    )
    initial_weights: str | None = option(
        None, "folder of an autoencoder with the same --widths, whose weights training starts from; default: random"
    )
    freeze_encoder: bool = option(
        False, "train only the decoder, so that the latents of --initial_weights do not change"
    )
    batch_size: int = option(32, "images per step", minimum=1)
    max_steps: int = option(10000, "optimizer steps", minimum=1)
    optimizer: str = option(
        "adamw", "adamw, or muon: Muon for the kernels of hidden layers, AdamW for the rest", choices=("adamw", "muon")
    )
    lr: float = option(2e-3, "learning rate", minimum=0)
    muon_lr: float = option(0.01, "learning rate of Muon's kernels; follows the schedule of lr", minimum=0)
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
    network = _initial_network(channels, facts.image_size, options)
    network = network.to(machine.device).to(memory_format=torch.channels_last)
    ema = Ema(network, options.ema_decay)
    optimizers = _make_optimizers(network, options)
    border = 0 if facts.crop is None else (facts.image_size - facts.crop) // 2
    streams = LossStreams.from_seed(options.seed, machine.device)
    batches = _shuffled_batches(dataset, options.batch_size, options.seed, machine.device)

    progress = progress_bar(range(options.max_steps), desc="autoencoder", unit="step")
    started = time.perf_counter()
    for step in progress:
        for optimizer in optimizers:
            base = optimizer.defaults["lr"]
            rate = learning_rate(options.lr_schedule, base, step, options.max_steps, warmup=100)
            for group in optimizer.param_groups:
                group["lr"] = rate
        pixels = next(batches).expand(-1, channels, -1, -1)
        with machine.autocast():
            loss, error, divergence = autoencoder_losses(network, pixels, border, options, streams)
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
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
    """Compute the mean and standard deviation of posterior samples per channel, as latents_mean and latents_std."""
    autoencoder = PretrainedAutoencoder(network, "unsaved", scale_factor=1.0).to(machine.device)

    def parts() -> Iterator[torch.Tensor]:
        for start in progress_bar(range(0, len(dataset), 512), desc="latent statistics", unit="batch"):
            images = torch.stack([dataset[i] for i in range(start, min(start + 512, len(dataset)))])
            yield autoencoder.encode(images.to(machine.device))

    found = measure_statistics(parts(), has_posterior=True)
    return {"latents_mean": list(found.mean), "latents_std": list(found.std)}


def snapshot_folder(options: AutoencoderTrainingOptions) -> Path:
    """The folder for snapshots of the weights until the finished autoencoder is saved."""
    return Path(f"{options.output}.snapshot")


def _initial_network(channels: int, image_size: int, options: AutoencoderTrainingOptions) -> Any:
    """The network before training: random, or with the weights of --initial_weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = new_autoencoder_kl(channels, options.widths, options.latent_channels, image_size, {})
    if options.initial_weights is not None:
        if not Path(options.initial_weights).is_dir():
            raise UsageError(f"--initial_weights {options.initial_weights}: expected the folder of an autoencoder")
        weights = load_network(Path(options.initial_weights), options.initial_weights).state_dict()
        mismatch = find_mismatch(network.state_dict(), weights)
        if any(mismatch):
            raise UsageError(
                f"--initial_weights {options.initial_weights} does not fit --widths and --latent_channels; {mismatch}; "
                "pass the widths, latent channels and image channels of that autoencoder"
            )
        network.load_state_dict(weights)
    if options.freeze_encoder:
        if options.initial_weights is None:
            raise UsageError("--freeze_encoder needs --initial_weights: a random encoder loses the images' details")
        for part in (network.encoder, network.quant_conv):
            part.requires_grad_(False)
    return network


def _make_optimizers(network: nn.Module, options: AutoencoderTrainingOptions) -> list[torch.optim.Optimizer]:
    """AdamW for all weights; or Muon for the kernels between hidden layers, and AdamW for the rest."""
    others: list[nn.Parameter] = []
    kernels: list[nn.Parameter] = []
    for name, weights in network.named_parameters():
        if weights.requires_grad:
            hidden = weights.dim() == 4 and not any(layer in name for layer in OUTER_LAYERS)
            (kernels if hidden and options.optimizer == "muon" else others).append(weights)
    adamw = torch.optim.AdamW(others, options.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return [adamw, Muon(kernels, options.muon_lr, weight_decay=0.01)] if kernels else [adamw]


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
