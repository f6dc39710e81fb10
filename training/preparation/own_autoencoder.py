"""The data's own autoencoder: `--pretrained_autoencoder_ckpt own` trains a small one, and keeps it with the data.

It lies in the folder of the data's caches, as autoencoders/<image size>_f<factor>c<channels>. Later runs on the same data find
it there. An interrupted training of it resumes with the next run.
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
from runtime.messages import fact, note
from runtime.outputs import write_error
from runtime.precision import Machine
from training.autoencoder.options import AutoencoderTrainingOptions
from training.autoencoder.output import has_weights
from training.autoencoder.run import autoencoder_options, train_autoencoder
from training.experiment import ExperimentOptions
from training.run import TrainingOptions

__all__ = ["OwnAutoencoderOptions", "UnfinishedError", "own_folder", "resolve_own"]

FOLDER = "autoencoders"  # below the folder of the data's caches, where images are not searched
SHARE = 0.2  # of --minutes
DEFAULT_MINUTES = 10.0
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
    training = replace(
        training,
        factor=own.autoencoder_factor,
        latent_channels=own.autoencoder_channels,
        depths=DEPTHS[own.autoencoder_factor],
        augment=("flip", "crop", "color"),
        tracker=options[ExperimentOptions].tracker,
    )
    if has_weights(folder):
        fact("autoencoder", f"found {folder}, trained on this data before; to train it again, remove the folder")
    else:
        fact("autoencoder", f"training one for this data first, in {folder}")
        if not train_autoencoder(dataset, held_out, training, machine, processes).complete:
            raise UnfinishedError
    return replace(chosen, pretrained_autoencoder_ckpt=str(folder))


def own_folder(data: DatasetOptions, own: OwnAutoencoderOptions, save_root: str) -> Path:
    """The folder of the data's own autoencoder; below `save_root` if the data's folder cannot be written."""
    name = f"{data.image_size}_f{own.autoencoder_factor}c{own.autoencoder_channels}"
    folder = data.derived / FOLDER / name
    if has_weights(folder) or write_error(folder.parent) is None:
        return folder
    digest = hashlib.sha256(str(data.derived.resolve()).encode(errors="surrogateescape")).hexdigest()[:8]
    other = Path(save_root) / FOLDER / digest / name
    note(f"cannot write into {data.derived}, so the autoencoder is in {other}")
    return other


def _length(own: OwnAutoencoderOptions, minutes: float, folder: Path) -> dict[str, float]:
    """The options of the training's length. A training that has begun keeps its own."""
    begun = AutoencoderTrainingOptions(output=str(folder)).run_folder / "config.json"
    if begun.exists():
        recorded = read_json(begun).get("options", {})
        return {name: recorded[name] for name in ("minutes", "max_steps") if name in recorded}
    if own.autoencoder_steps:
        return {"max_steps": own.autoencoder_steps}
    return {"minutes": own.autoencoder_minutes or (SHARE * minutes if minutes else DEFAULT_MINUTES)}
