"""The options of autoencoder training."""

import math
from dataclasses import dataclass
from pathlib import Path

from models.autoencoders.architectures import ArchitectureOptions
from models.autoencoders.training_loss import AutoencoderLossOptions
from options import UsageError, option
from training.autoencoder.augmentation import AUGMENTATIONS
from training.auxiliary.setup import EncoderOptions
from training.schedules import SCHEDULES, learning_rate
from training.tracking.trackers import TRACKERS

__all__ = ["AutoencoderTrainingOptions"]

WARMUP_STEPS = 100


@dataclass(frozen=True)
class AutoencoderTrainingOptions(AutoencoderLossOptions, EncoderOptions, ArchitectureOptions):
    """Autoencoder training."""

    output: str = option(
        "autoencoder",
        "folder of the finished autoencoder, in diffusers format; the run itself is in the folder OUTPUT.training",
        on_resume="freely",
        common=True,
    )
    image_channels: int | None = option(
        None, "input channels; default: the dataset's; 3 repeats the channel of gray images", minimum=1
    )
    initial_weights: str | None = option(
        None,
        "folder of an autoencoder in diffusers format, whose architecture and weights training starts from; default: random",
        on_resume="freely",
    )
    freeze_encoder: bool = option(
        False, "train only the decoder, so that the latents of --initial_weights do not change"
    )
    augment: tuple[str, ...] = option(
        (), "random changes of the images: mirror, shift, or change brightness, contrast and saturation",
        choices=AUGMENTATIONS,
    )  # fmt: skip
    batch_size: int = option(32, "images per process and step", minimum=1, common=True)
    max_steps: int = option(10000, "optimizer steps", minimum=1, on_resume="on_request", common=True)
    minutes: float = option(
        0.0,
        "as many steps as fit into this time, which is measured at the start, instead of --max_steps; 0: off",
        minimum=0,
        on_resume="on_request",
        common=True,
    )
    optimizer: str = option(
        "adamw", "adamw, or muon: Muon for the kernels of hidden layers, AdamW for the rest", choices=("adamw", "muon")
    )
    lr: float = option(2e-3, "learning rate", minimum=0, on_resume="on_request", common=True)
    muon_lr: float = option(
        0.01, "learning rate of Muon's kernels; follows the schedule of lr", minimum=0, on_resume="on_request"
    )
    lr_schedule: str = option("trapezoid", "learning-rate schedule", choices=SCHEDULES, on_resume="on_request")
    ema_decay: float = option(
        0.999, "decay of the exponential moving average (EMA) of the weights, which is saved", minimum=0, maximum=1
    )
    seed: int = option(0, "seed of the initial weights, the data order and all random numbers")
    half_weights: bool = option(True, "store the weights in float16, which halves the file size", on_resume="freely")
    max_bad_steps: int = option(
        100, "stop after this many steps in a row without a finite gradient; 0: never", minimum=0, on_resume="freely"
    )
    save_minutes: float = option(2.0, "minutes between saves of the training state", minimum=0, on_resume="freely")
    validate_minutes: float = option(
        5.0,
        "minutes between validations on held-out images, each with a grid of reconstructions; 0: only at the end",
        minimum=0,
        on_resume="freely",
    )
    log_every: int = option(50, "steps between lines of metrics.jsonl", minimum=1, on_resume="freely")
    tracker: str = option(
        "tensorboard", "where to show the metrics, next to metrics.jsonl", choices=TRACKERS, on_resume="freely"
    )
    resume: bool = option(
        False, "also resume after changing the length, learning rate or number of images", on_resume="freely"
    )
    overwrite: bool = option(False, "start over; an existing run in OUTPUT.training is moved aside", on_resume="freely")

    @property
    def run_folder(self) -> Path:
        """The folder of the run: state, metrics, samples and the newest weights."""
        return Path(f"{self.output.rstrip('/')}.training")

    def rate_at(self, step: int, last_step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return learning_rate(self.lr_schedule, self.lr, step, last_step, warmup=WARMUP_STEPS)

    def check(self) -> None:
        """Check the options on their own.

        Raises:
            UsageError: they contradict each other, or a rate is infinite.
        """
        for name in ("lr", "muon_lr", "discriminator_lr"):
            if math.isinf(getattr(self, name)):
                raise UsageError(f"--{name}: expected a finite number, but {getattr(self, name)} was given")
        if self.freeze_encoder and self.initial_weights is None:
            raise UsageError("--freeze_encoder needs --initial_weights: a random encoder loses the images' details")
        self._check_losses()

    def _check_losses(self) -> None:
        """Check the options of the losses."""
        if not (self.l2_weight or self.l1_weight or self.lpips_weight):
            raise UsageError(
                "--l2_weight 0 leaves no loss of the reconstructed images: add --l1_weight 1 or --lpips_weight 1"
            )
        if bool(self.align_weight) != bool(self.align_encoder):
            have, lack = ("align_weight", "align_encoder") if self.align_weight else ("align_encoder", "align_weight")
            raise UsageError(f"--{have} needs --{lack} as well")
        if self.align_weight and self.freeze_encoder:
            raise UsageError("--align_weight trains the encoder, which --freeze_encoder keeps as it is: leave one out")
