"""The data's own autoencoder: `--pretrained_autoencoder_ckpt own` trains a small one, and keeps it with the data.

It lies in the folder of the data's caches, as autoencoders/<dataset>_<image size>_f<factor>c<channels>. Later runs on the same
data find it there, with a warning if the images have changed. An interrupted training of it resumes with the next run.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from datasets_prep.datasets import DatasetOptions, ImageDataset
from models.autoencoders.architectures import FACTORS
from models.autoencoders.loading import OWN, AutoencoderOptions
from options import Options, UsageError, option
from runtime.distributed import Processes
from runtime.files import read_json
from runtime.messages import fact, note, warn
from runtime.outputs import write_error
from runtime.precision import Machine
from training.autoencoder.options import AutoencoderTrainingOptions
from training.autoencoder.output import has_weights
from training.autoencoder.run import autoencoder_options, train_autoencoder
from training.autoencoder.setup import state_of_images
from training.experiment import IMAGES, STATE_OF_IMAGES, ExperimentOptions
from training.run import TrainingOptions

__all__ = ["OwnAutoencoderOptions", "UnfinishedError", "own_folder", "resolve_own"]

FOLDER = "autoencoders"  # below the folder of the data's caches, where images are not searched
SHARE = 0.2  # of --minutes
DEFAULT_MINUTES = 10.0
LENGTHS = {"autoencoder_minutes", "autoencoder_steps"}
DEPTHS = {4: (1, 2), 8: (1, 2, 2), 16: (1, 2, 2, 2)}  # residual blocks of each level, by factor


class UnfinishedError(Exception):
    """The training of the autoencoder was interrupted, and saved."""


@dataclass(frozen=True)
class OwnAutoencoderOptions:
    """The data's own autoencoder, with --pretrained_autoencoder_ckpt own."""

    autoencoder_minutes: float = option(
        0.0,
        f"time to train it, if the data has none yet; 0: {SHARE:.0%} of --minutes, or {DEFAULT_MINUTES:g}".replace(
            "%", " %"
        ),
        minimum=0,
        on_resume="freely",
    )
    autoencoder_steps: int = option(
        0,
        "optimizer steps to train it, instead of a time; 0: autoencoder_minutes applies",
        minimum=0,
        on_resume="freely",
    )
    autoencoder_factor: int = option(4, "its downsampling factor: 4, 8 or 16")
    autoencoder_channels: int = option(4, "channels of its latents", minimum=1)


def resolve_own(
    options: Options, dataset: ImageDataset, held_out: ImageDataset, machine: Machine, processes: Processes
) -> AutoencoderOptions:
    """The options of the run's autoencoder; `own` is replaced by its folder, after its training.

    Every process must call this.

    Args:
        options: all options of the run.
        dataset: training images.
        held_out: held-out images.
        machine: device and precision.
        processes: share the training.

    Raises:
        UsageError: the options contradict the images, or the folder holds something else.
        UnfinishedError: the training was interrupted.
    """
    chosen = options[AutoencoderOptions]
    if chosen.pretrained_autoencoder_ckpt != OWN:
        return chosen
    own = options[OwnAutoencoderOptions]
    if own.autoencoder_factor not in FACTORS:
        raise UsageError(
            f"--autoencoder_factor {own.autoencoder_factor}: expected one of {', '.join(map(str, FACTORS))}"
        )
    folder = own_folder(options[DatasetOptions], own, options[ExperimentOptions].save_root)
    training = autoencoder_options("dc", output=str(folder), **_length(own, options[TrainingOptions].minutes, folder))
    experiment = options[ExperimentOptions]
    training = replace(
        training,
        resume=experiment.resume,
        overwrite=experiment.overwrite,
        factor=own.autoencoder_factor,
        latent_channels=own.autoencoder_channels,
        depths=DEPTHS[own.autoencoder_factor],
        augment=("flip", "crop", "color"),
        tracker=experiment.tracker,
    )
    if has_weights(folder):
        _describe_found(folder, training.run_folder, dataset)
        if unused := sorted(options.given.keys() & LENGTHS):
            note(f"--{' and --'.join(unused)}: no effect, because the data has an autoencoder already")
    else:
        fact("autoencoder", f"training one for this data first, in {folder}")
        if not train_autoencoder(dataset, held_out, training, machine, processes).complete:
            raise UnfinishedError
    return replace(chosen, pretrained_autoencoder_ckpt=str(folder))


def own_folder(data: DatasetOptions, own: OwnAutoencoderOptions, save_root: str) -> Path:
    """The folder of the data's own autoencoder; below `save_root` if the data's folder cannot be written."""
    name = f"{data.dataset}_{data.image_size}_f{own.autoencoder_factor}c{own.autoencoder_channels}"
    folder = data.derived / FOLDER / name
    if has_weights(folder) or write_error(folder.parent) is None:
        return folder
    digest = hashlib.sha256(str(data.derived.resolve()).encode(errors="surrogateescape")).hexdigest()[:8]
    other = Path(save_root) / FOLDER / digest / name
    note(f"cannot write into {data.derived}, so the autoencoder is in {other}")
    return other


def _describe_found(folder: Path, run_folder: Path, dataset: ImageDataset) -> None:
    """Print that the data has an autoencoder, and warn if it was trained on other images."""
    again = f"to train it again, remove {folder} and {run_folder}"
    fact("autoencoder", f"found {folder}, trained on this data before; {again}")
    config = run_folder / "config.json"
    recorded = read_json(config).get("options", {}) if config.exists() else {}
    before, now = recorded.get(STATE_OF_IMAGES), state_of_images(dataset)
    if before not in (None, now):
        warn(
            f"the images have changed, or been copied, since {folder} was trained: {recorded.get(IMAGES)} then, "
            f"{len(dataset)} now. It is used nevertheless; {again}"
        )


def _length(own: OwnAutoencoderOptions, minutes: float, folder: Path) -> dict[str, float]:
    """The options of the training's length. A training that has begun keeps its own."""
    begun = AutoencoderTrainingOptions(output=str(folder)).run_folder / "config.json"
    if begun.exists():
        recorded = read_json(begun).get("options", {})
        return {name: recorded[name] for name in ("minutes", "max_steps") if name in recorded}
    if own.autoencoder_steps:
        return {"max_steps": own.autoencoder_steps}
    return {"minutes": own.autoencoder_minutes or (SHARE * minutes if minutes else DEFAULT_MINUTES)}
