"""Autoencoders in diffusers format: the finished one with measured statistics of its latents, and the newest of a run."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from models.autoencoders.pretrained import PretrainedAutoencoder
from models.autoencoders.statistics import measure_statistics
from options import UsageError, as_json
from runtime.files import replace_folder, write_json
from runtime.outputs import check_folder
from runtime.precision import Machine
from runtime.progress import progress_bar
from training.autoencoder.options import AutoencoderTrainingOptions
from training.nan_guard import check_trained

__all__ = ["check_output", "check_statistics", "has_weights", "posterior_statistics", "rounded", "save_autoencoder"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGES_PER_PART = 512
HIDDEN = ("resume", "overwrite")  # options that do not describe an autoencoder


class Images(Protocol):
    """Images uint8 [C, H, W] by index, such as a dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> torch.Tensor: ...


def has_weights(folder: str | Path) -> bool:
    """Whether `folder` holds an autoencoder that this module has saved."""
    return (Path(folder) / WEIGHTS).is_file()


def check_output(folder: str | Path) -> None:
    """Check that saving to `folder` is possible, and replaces nothing other than an autoencoder.

    Raises:
        UsageError: the folder exists and is not an autoencoder, or its parent cannot be written.
    """
    if Path(folder).exists() and not has_weights(folder):
        raise UsageError(f"--output {folder} exists and is not an autoencoder: name a new folder")
    check_folder(Path(folder).parent, "--output")


def rounded(network: nn.Module, options: AutoencoderTrainingOptions) -> nn.Module:
    """A copy of a network, with its weights rounded to the precision of the saved file."""
    copied = copy.deepcopy(network)
    return copied.half().float() if options.half_weights else copied


def posterior_statistics(
    network: nn.Module, dataset: Images, machine: Machine, shown: bool = True
) -> dict[str, list[float]]:
    """Compute the mean and standard deviation of posterior samples per channel, as latents_mean and latents_std."""
    autoencoder = PretrainedAutoencoder(network, "unsaved", scale_factor=1.0).to(machine.device)

    def parts() -> Iterator[torch.Tensor]:
        starts = range(0, len(dataset), IMAGES_PER_PART)
        for start in progress_bar(starts, desc="latent statistics", unit="batch", disable=not shown):
            images = torch.stack([dataset[i] for i in range(start, min(start + IMAGES_PER_PART, len(dataset)))])
            yield autoencoder.encode(images.to(machine.device))

    found = measure_statistics(parts(), autoencoder.has_posterior)
    return {"latents_mean": list(found.mean), "latents_std": list(found.std)}


def check_statistics(statistics: dict[str, list[float]]) -> None:
    """Refuse latents that cannot be scaled.

    Raises:
        UsageError: a channel is constant.
    """
    if constant := [str(channel) for channel, deviation in enumerate(statistics["latents_std"]) if not deviation]:
        raise UsageError(
            f"the latents' channels {', '.join(constant)} are constant: train longer, use fewer --latent_channels, or "
            "--standardize_weight 1e-3"
        )


def save_autoencoder(
    network: nn.Module,
    folder: str | Path,
    statistics: dict[str, list[float]],
    options: AutoencoderTrainingOptions,
    **facts: Any,
) -> None:
    """Save in diffusers format (`save_pretrained`), with the training options and further facts in training.json.

    The folder is replaced atomically.

    Raises:
        DivergedError: weights are not finite, perhaps only in float16.
    """
    stored: Any = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    if statistics:  # diffusers applies scaling_factor next to them
        stored.register_to_config(scaling_factor=1.0, **statistics)
    if options.half_weights:
        stored.half()
    check_trained(stored, "autoencoder")
    settled = replace(options, widths=_widths(stored) or options.widths)
    record = {name: value for name, value in as_json(settled).items() if name not in HIDDEN}
    with replace_folder(folder) as temporary:
        stored.save_pretrained(temporary)
        write_json(temporary / "training.json", {**record, **facts})


def _widths(network: Any) -> tuple[int, ...]:
    """The widths of a network's levels as its configuration records them; () for other classes."""
    config = network.config
    if "block_out_channels" in config:
        return tuple(config["block_out_channels"])
    levels = tuple(config.get("encoder_block_out_channels", ()))
    first = config.get("encoder_layers_per_block", (1,))[0]
    return levels if first else levels[1:]
