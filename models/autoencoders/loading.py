"""Loading of autoencoders by name: an entry of AUTOENCODERS such as `none`, a folder in diffusers format, or a hub id."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.autoencoders.hub import UnreachableHubError
from models.autoencoders.kl import load_kl
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.protocol import Autoencoder
from options import UsageError, option

__all__ = ["AUTOENCODERS", "AutoencoderOptions", "is_hub_id", "load_autoencoder"]

REPOSITORY = Path(__file__).resolve().parents[2]  # relative folders are also searched for here
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class AutoencoderOptions:
    """Autoencoder."""

    pretrained_autoencoder_ckpt: str = option(
        "stabilityai/sd-vae-ft-mse",
        "diffusers AutoencoderKL: a hub id, a local folder, or none for pixel space",
        common=True,
    )
    scale_factor: float | None = option(
        None,
        "factor on the latents; default: the scale in the autoencoder's configuration (Stable Diffusion: 0.18215)",
        minimum=1e-6,
    )
    f: int | None = option(None, "downsampling factor from images to latents; default: the autoencoder's own factor")


def _pixel_space(options: AutoencoderOptions, channels: int) -> Autoencoder:
    return PixelSpace(channels)


# Registered autoencoders: name to loader(options, image channels).
AUTOENCODERS: dict[str, Callable[[AutoencoderOptions, int], Autoencoder]] = {"none": _pixel_space}


def load_autoencoder(options: AutoencoderOptions, channels: int) -> Autoencoder:
    """Load the autoencoder that `options` names; `channels` is the number of image channels, which pixel space needs.

    Raises:
        UsageError: a missing folder, an unreachable hub, files that are not a complete AutoencoderKL in safetensors format,
            or a factor that differs from `--f`.
    """
    name = options.pretrained_autoencoder_ckpt
    registered = AUTOENCODERS.get(name)
    autoencoder = registered(options, channels) if registered else _load_network(name, options.scale_factor)
    if options.f not in (None, autoencoder.factor):
        raise UsageError(
            f"--f {options.f} contradicts the autoencoder {name}, whose factor is {autoencoder.factor}: omit --f"
        )
    return autoencoder


def is_hub_id(name: str) -> bool:
    """Whether `name` refers to an autoencoder on the hub, and not to a local folder or pixel space."""
    return _local_folder(name) is None and HUB_ID.fullmatch(name) is not None


def _load_network(name: str, scale_factor: float | None) -> Autoencoder:
    folder = _local_folder(name)
    if folder is None and not is_hub_id(name):
        found = "a file, but expected a folder in diffusers format" if Path(name).is_file() else "no such folder"
        raise UsageError(f"--pretrained_autoencoder_ckpt {name}: {found}, and not a hub id of the form owner/name")
    try:
        return load_kl(folder, name, scale_factor)
    except UsageError as error:
        if folder is not None or error.__cause__ is None:  # without a cause, the files were read but do not fit
            raise
        known = isinstance(error, UnreachableHubError)  # its message says what to do
        hint = "" if known else "; without internet access, give a local folder in diffusers format"
        owner, _, rest = name.partition("/")
        if _local_folder(owner):
            hint += f" (the folder {owner} exists, but does not contain {rest})"
        raise UsageError(f"{error}{hint}") from error


def _local_folder(name: str) -> Path | None:
    return next((path for path in (Path(name), REPOSITORY / name) if path.is_dir()), None)
