"""The data of a run, and the networks that encode, show and score it."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from datasets_prep.conditions import ConditionSource
from datasets_prep.datasets import HELD_OUT_IMAGES, DatasetOptions, FlipOptions, ImageDataset, choose_flips
from datasets_prep.folder_layout.report import show_data
from datasets_prep.latents import scale_by_statistics
from evaluation.checks import check_scoring
from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import FeatureOptions, choose_features
from evaluation.reconstruction import draw_reconstructions
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.preview import load_twin
from models.autoencoders.protocol import Autoencoder
from models.conditions import DenseInput
from options import Options
from runtime.files import write_json
from runtime.messages import fact, warn
from runtime.precision import Machine
from runtime.randomness import seed_for
from tasks.task import TrainingTask
from training.experiment import (
    RECONSTRUCTIONS,
    ExperimentOptions,
    recorded_autoencoder,
)
from training.run import TrainingOptions

__all__ = ["Inputs", "keep_scale", "open_inputs", "open_splits", "show_reconstructions"]


class Inputs(NamedTuple):
    """The data of a run: both splits and their dense conditions, the autoencoder and its twin, and the feature network."""

    dataset: ImageDataset
    held_out: ImageDataset
    autoencoder: Autoencoder
    condition: ConditionSource | None
    held_out_condition: ConditionSource | None
    features: FeatureNetwork | None
    twin: Autoencoder | None

    def dense(self, dropout: float) -> DenseInput | None:
        """The dense condition in the network's input, if any."""
        return None if self.condition is None else replace(self.condition.dense, dropout=dropout)


def open_splits(task: TrainingTask, data: DatasetOptions, flips: FlipOptions) -> tuple[ImageDataset, ImageDataset]:
    """Open the training images and the held-out images that training uses, and print what they are."""
    dataset, held_out = (choose_flips(task.open(data, split), flips) for split in ("train", "validation"))
    show_data(dataset, held_out)
    return dataset, held_out.head(HELD_OUT_IMAGES)


def open_inputs(
    task: TrainingTask,
    options: Options,
    splits: tuple[ImageDataset, ImageDataset],
    encoder: AutoencoderOptions,
    machine: Machine,
) -> Inputs:
    """Load the autoencoder that `encoder` names, and the feature network; the samples can be scored."""
    data, scored = options[DatasetOptions], options[ExperimentOptions].eval_samples
    dataset, held_out = splits
    autoencoder = load_autoencoder(encoder, dataset.facts.channels).to(machine.device)
    scale_by_statistics(dataset, autoencoder, encoder.latent_statistics)
    features = None
    if scored:
        dataset.check_images("--eval_samples")
        features = choose_features(options[FeatureOptions], data.dataset, machine)
        check_scoring(features, ("fid",), scored, len(dataset), dataset.facts)
    own_options = options[task.condition_options] if task.condition_options else None
    condition, held_out_condition = (
        task.condition(split, autoencoder, machine, own_options, seed) if task.condition else None
        for split, seed in ((dataset, options[TrainingOptions].seed), (held_out, seed_for("held-out conditions")))
    )
    name, twin = options[ExperimentOptions].preview_autoencoder, None
    if name:
        twin = load_twin(name, autoencoder, dataset.facts.channels).to(machine.device)
    return Inputs(dataset, held_out, autoencoder, condition, held_out_condition, features, twin)


def keep_scale(autoencoder: Autoencoder, folder: Path) -> None:
    """Scale latents as the run in `folder` has done so far, even if the autoencoder's configuration is read otherwise now."""
    recorded = recorded_autoencoder(folder)
    if recorded is None:
        return
    found = autoencoder.describe()
    if recorded.sha256 in (None, found.sha256):
        autoencoder.restore_scale(recorded)
    else:
        warn(
            f"the run in {folder} was begun with the autoencoder {recorded.id} (SHA-256 {str(recorded.sha256)[:12]}), but "
            f"{found.id} now has other weights ({str(found.sha256)[:12]}): its latents differ from those learned so far"
        )


def show_reconstructions(autoencoder: Autoencoder, held_out: ImageDataset, machine: Machine, folder: Path) -> None:
    """Save a picture of held-out images above their reconstructions, and the PSNR of the autoencoder, in a run folder."""
    if autoencoder.is_pixel_space or not held_out.has_images:
        return
    record = folder / RECONSTRUCTIONS
    picture = record.with_suffix(".png")
    ratio = draw_reconstructions(autoencoder, held_out, machine.device, picture)
    write_json(record, {"psnr_db": ratio, "autoencoder": autoencoder.describe()})
    fact("autoencoder", f"PSNR {ratio:.2f} dB on held-out images; reconstructions: {picture}")
