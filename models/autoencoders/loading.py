"""Loading of autoencoders by name: an entry of AUTOENCODERS such as `none`, a folder, a hub id, or a file.

Folders and the hub's repositories are in diffusers format, and files have the latent diffusion code's names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from models.autoencoders.diffusers_files import CONFIG, PIPELINE_PART, load_network, save_network
from models.autoencoders.hub import UnreachableHubError
from models.autoencoders.ldm import load_ldm
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.autoencoders.protocol import MEASURED, UNMEASURED, Autoencoder, AutoencoderFacts
from models.autoencoders.scale import has_superseded_scale
from models.autoencoders.statistics import read_chosen_scale
from options import UsageError, option
from runtime.messages import fact, note

__all__ = [
    "AUTOENCODERS",
    "OWN",
    "AutoencoderOptions",
    "is_hub_id",
    "load_autoencoder",
    "load_pretrained",
    "save_autoencoder",
]

REPOSITORY = Path(__file__).resolve().parents[2]  # relative folders are also searched for here
OWN = "own"  # the data's own autoencoder, which training scripts train and replace by its folder
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class AutoencoderOptions:
    """Autoencoder."""

    pretrained_autoencoder_ckpt: str = option(
        "stabilityai/sd-vae-ft-mse",
        "autoencoder: a hub id or folder in diffusers format, a latent diffusion file, none for pixel space, or own: training "
        "first trains a small one on the images, and keeps it with them (docs/own_images.md)",
        common=True,
    )
    scale_factor: float | None = option(
        None,
        "factor on the latents; default: the scale in the autoencoder's configuration (Stable Diffusion: 0.18215). With a "
        "file of statistics, (z - mean) / std is multiplied by it",
        minimum=1e-6,
    )
    latent_statistics: str = option(
        "",
        "mean and deviation of the latents' channels: `measured` over the training images, or a file such as "
        "latents_stats.pt, which may be combined with --scale_factor; default: the autoencoder's own scale, or measured if "
        "it has none",
    )
    f: int | None = option(None, "downsampling factor from images to latents; default: the autoencoder's own factor")


def _pixel_space(options: AutoencoderOptions, channels: int) -> Autoencoder:
    return PixelSpace(channels)


def _refuse_own(options: AutoencoderOptions, channels: int) -> Autoencoder:
    raise UsageError(
        f"--pretrained_autoencoder_ckpt {OWN} is for training scripts, which print the folder of the data's own autoencoder: "
        "pass that folder"
    )


# Registered autoencoders: name to loader(options, image channels).
AUTOENCODERS: dict[str, Callable[[AutoencoderOptions, int], Autoencoder]] = {"none": _pixel_space, OWN: _refuse_own}


def load_autoencoder(
    options: AutoencoderOptions, channels: int, recorded: AutoencoderFacts | None = None
) -> Autoencoder:
    """Load the autoencoder that `options` names, and print what it is.

    Args:
        options: its name and scale.
        channels: number of image channels, which pixel space needs.
        recorded: facts in a checkpoint, whose scale replaces the one in `options`.

    Raises:
        UsageError: a missing folder, an unreachable hub, files that are not a complete autoencoder, statistics that do not fit
            it, or a factor that differs from `--f`.
    """
    name = options.pretrained_autoencoder_ckpt
    registered = AUTOENCODERS.get(name)
    autoencoder = registered(options, channels) if registered else load_pretrained(name, options.scale_factor)
    if options.f not in (None, autoencoder.factor):
        raise UsageError(
            f"--f {options.f} contradicts the autoencoder {name}, whose factor is {autoencoder.factor}: omit --f"
        )
    if recorded is not None:
        autoencoder.restore_scale(recorded)
    elif options.latent_statistics:
        _choose_statistics(autoencoder, options)
    if isinstance(autoencoder, PretrainedAutoencoder):
        fact("autoencoder", autoencoder.summary())
    return autoencoder


def _choose_statistics(autoencoder: Autoencoder, options: AutoencoderOptions) -> None:
    """Replace the autoencoder's own scale as --latent_statistics says. A file's statistics apply times --scale_factor.

    Raises:
        UsageError: statistics are to be measured in spite of --scale_factor, the file does not fit, or the autoencoder has no
            other scale than its own.
    """
    source = options.latent_statistics
    facts = replace(autoencoder.describe(), latents_mean=(), latents_std=(), statistics=UNMEASURED)
    if source != MEASURED:
        mean, std, path = read_chosen_scale(source, autoencoder.latent_channels, options.scale_factor)
        facts = replace(facts, latents_mean=mean, latents_std=std, statistics=Path(path).name)
    elif options.scale_factor is not None:
        raise UsageError(
            f"--latent_statistics {MEASURED} and --scale_factor both set the scale of the latents: omit one"
        )
    autoencoder.restore_scale(facts)
    if autoencoder.describe().statistics != facts.statistics:
        raise UsageError(
            f"--latent_statistics: the latents of {options.pretrained_autoencoder_ckpt} have a fixed scale: omit the flag"
        )


def is_hub_id(name: str) -> bool:
    """Whether `name` refers to an autoencoder on the hub, and not to a local folder or pixel space."""
    return _local_folder(name) is None and HUB_ID.fullmatch(name) is not None


def load_pretrained(name: str, scale_factor: float | None = None) -> PretrainedAutoencoder:
    """Load an autoencoder from a folder, the hub or a file.

    Raises:
        UsageError: there is none of this name, or it cannot be loaded.
    """
    folder = _local_folder(name)
    if folder is None and (file := _local(name, Path.is_file)):
        network, scaled = load_ldm(file, name)
        return PretrainedAutoencoder(network, name, scale_factor, scaled)
    if folder is None and not is_hub_id(name):
        raise UsageError(
            f"--pretrained_autoencoder_ckpt {name}: no such folder, and not a hub id of the form owner/name"
        )
    try:
        network = load_network(folder, name)
    except UsageError as error:
        if folder is not None or error.__cause__ is None:  # without a cause, the files were read but do not fit
            raise
        known = isinstance(error, UnreachableHubError)  # its message says what to do
        hint = "" if known else "; without internet access, give a local folder in diffusers format"
        owner, _, rest = name.partition("/")
        if _local_folder(owner):
            hint += f" (the folder {owner} exists, but does not contain {rest})"
        raise UsageError(f"{error}{hint}") from error
    if scale_factor is None and has_superseded_scale(network.config):
        note(
            f"{name} was written by an earlier version of train_autoencoder.py: its latents are normalized with latents_mean "
            "and latents_std only; set scaling_factor to 1.0 in its config.json, so that diffusers does the same"
        )
    return PretrainedAutoencoder(network, name, scale_factor)


def save_autoencoder(autoencoder: Autoencoder, folder: Path) -> str:
    """Write an autoencoder's weights and configuration in diffusers format.

    Returns:
        The name of diffusers' class; "" for pixel space, for which nothing is written.

    Raises:
        UsageError: it is an extension's, which diffusers does not know.
    """
    if autoencoder.is_pixel_space:
        return ""
    if not isinstance(autoencoder, PretrainedAutoencoder):
        raise UsageError(
            f"the autoencoder {autoencoder.describe().id} is registered by one of your files, and has no class in diffusers: "
            "expected one in diffusers format, a latent diffusion file, or none"
        )
    save_network(autoencoder.network, folder)
    return autoencoder.class_name


def _local_folder(name: str) -> Path | None:
    """The local folder of an autoencoder, which may be inside a pipeline's folder of this name."""
    folder = _local(name, Path.is_dir)
    inside = folder / PIPELINE_PART if folder else None
    pipeline = folder and inside and (folder / "model_index.json").exists() and (inside / CONFIG).exists()
    return inside if pipeline else folder


def _local(name: str, exists: Callable[[Path], bool]) -> Path | None:
    return next((path for path in (Path(name), REPOSITORY / name) if exists(path)), None)
