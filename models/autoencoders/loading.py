"""Autoencoders by name: an entry of AUTOENCODERS such as `none`, a local folder in diffusers format, or a hub id."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.autoencoders.kl import load_kl
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.protocol import Autoencoder
from options import UsageError, option

__all__ = ["AUTOENCODERS", "AutoencoderOptions", "is_hub_id", "load_autoencoder"]

REPOSITORY = Path(__file__).resolve().parents[2]  # relative folders are also looked for here
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class AutoencoderOptions:
    """Autoencoder."""

    pretrained_autoencoder_ckpt: str = option(
        "stabilityai/sd-vae-ft-mse", "diffusers AutoencoderKL: a hub id, a local folder, or none for pixel space"
    )
    scale_factor: float | None = option(
        None,
        "factor on the latents; default: the autoencoder's own statistics (Stable Diffusion: 0.18215)",
        minimum=1e-6,
    )
    f: int | None = option(
        None, "how many times smaller latents are than images; default: the autoencoder's own factor"
    )


def _pixel_space(options: AutoencoderOptions, channels: int) -> Autoencoder:
    return PixelSpace(channels)


# Autoencoders that have a name of their own: from it to loader(options, channels of the images).
AUTOENCODERS: dict[str, Callable[[AutoencoderOptions, int], Autoencoder]] = {"none": _pixel_space}


def load_autoencoder(options: AutoencoderOptions, channels: int) -> Autoencoder:
    """Load the autoencoder that `options` names; `channels` is that of the images, for pixel space.

    Raises:
        UsageError: a missing folder, an unreachable hub, files that are no AutoencoderKL in safetensors format, or another
            factor than `--f`.
    """
    name = options.pretrained_autoencoder_ckpt
    registered = AUTOENCODERS.get(name)
    autoencoder = registered(options, channels) if registered else _load_network(name, options.scale_factor)
    if options.f not in (None, autoencoder.factor):
        raise UsageError(f"--f {options.f} contradicts the autoencoder {name}, whose factor is {autoencoder.factor}")
    return autoencoder


def is_hub_id(name: str) -> bool:
    """Whether `name` stands for an autoencoder on the hub, not for a local folder or pixel space."""
    return _local_folder(name) is None and HUB_ID.fullmatch(name) is not None


def _load_network(name: str, scale_factor: float | None) -> Autoencoder:
    folder = _local_folder(name)
    if folder is None and not is_hub_id(name):
        raise UsageError(
            f"--pretrained_autoencoder_ckpt {name}: no such folder (and no hub id of the form owner/name either)"
        )
    try:
        return load_kl(folder, name, scale_factor)
    except UsageError as error:
        if folder is not None:
            raise
        hint = "; without a network, name a local folder in diffusers format"
        owner, _, rest = name.partition("/")
        if _local_folder(owner):
            hint += f" (the folder {owner} is there, but has no {rest})"
        raise UsageError(f"{error}{hint}") from error


def _local_folder(name: str) -> Path | None:
    return next((path for path in (Path(name), REPOSITORY / name) if path.is_dir()), None)
