"""The options and components of a training run."""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from checkpoints.header import Header
from datasets_prep.conditions import ConditionSource
from datasets_prep.moments import MomentSource
from flow.objectives import Objective
from models.autoencoders.protocol import Autoencoder
from options import UsageError, option
from runtime.distributed import Processes
from runtime.messages import note
from runtime.precision import Machine
from training.averages.power import LARGEST_WIDTH, SMALLEST_WIDTH
from training.experiment import ExperimentOptions
from training.optimizers import OptimizerOptions
from training.schedules import SCHEDULES, learning_rate
from training.validation import Validation

__all__ = ["TrainingOptions", "TrainingRun"]

FINAL_LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class TrainingOptions(OptimizerOptions):
    """Training."""

    seed: int = option(1024, "seed of the initial weights and of all random numbers", common=True)
    batch_size: int = option(128, "images per process and step", minimum=1, common=True)
    grad_accumulation: int = option(
        1, "split the batch into this many parts to save memory", minimum=1, on_resume="rounding", common=True
    )
    fsdp: bool = option(
        False,
        "shard the weights across processes (FSDP2), for networks that do not fit on one GPU",
        on_resume="rounding",
    )
    num_epoch: int = option(1200, "passes over the training images", minimum=1, on_resume="on_request", common=True)
    max_steps: int = option(
        0, "optimizer steps; 0: num_epoch sets the length", minimum=0, on_resume="on_request", common=True
    )
    minutes: float = option(
        0.0,
        "as many steps as fit into this time from the start of the command, data's autoencoder and caches included; measured "
        "once, and kept on resume; instead of --max_steps and --num_epoch; 0: off",
        minimum=0,
        on_resume="on_request",
        common=True,
    )
    max_minutes: float = option(
        0.0, "end the run after this many minutes (not reproducible); 0: no limit", minimum=0, on_resume="freely"
    )
    lr_schedule: str = option(
        "cosine",
        "learning-rate schedule, down to 1e-5; trapezoid decays over the last 40 %",
        choices=SCHEDULES,
        on_resume="on_request",
    )
    no_lr_decay: bool = option(False, "keep the learning rate constant", on_resume="on_request")
    warmup_steps: int = option(
        0, "steps of linear learning-rate warmup", minimum=0, on_resume="on_request", common=True
    )
    grad_clip: float = option(0.0, "maximum gradient norm; 0: no clipping", minimum=0, on_resume="on_request")
    augment_copies: int = option(8, "variants of each image for --augment, encoded once and cached", minimum=1)
    augment_probability: float = option(
        0.5, "probability of training on a variant in place of the image, with --augment", minimum=0, maximum=1
    )
    use_ema: bool = option(
        True, "use the exponential moving average (EMA) of the weights in samples, validation and checkpoints"
    )
    ema_decay: float = option(0.9999, "EMA decay per step, lower in the first steps", minimum=0, maximum=1)
    posthoc_ema: tuple[float, ...] = option(
        (),
        "also track power averages of these relative widths, such as 0.05 0.10, from which python -m training.posthoc_ema "
        "rebuilds any width (EDM2)",
        minimum=SMALLEST_WIDTH,
        maximum=LARGEST_WIDTH,
    )
    posthoc_ema_every: int = option(
        0,
        "steps between snapshots of the power averages; 0: 1/32 of the run",
        minimum=0,
        on_resume="freely",
        shown="1/32 of the run",
    )
    max_bad_steps: int = option(
        100, "stop after this many steps in a row without a finite gradient; 0: never", minimum=0, on_resume="freely"
    )

    def check(self) -> None:
        """Check that the options do not contradict each other.

        Raises:
            UsageError: they do, or a rate is infinite.
        """
        if len(self.adam_betas) != 2 or max(self.adam_betas) >= 1:
            raise UsageError(f"--adam_betas: expected two numbers below 1, but {self.adam_betas} was given")
        for name in ("lr", "muon_lr", "weight_decay"):
            if math.isinf(getattr(self, name)):
                raise UsageError(f"--{name}: expected a finite number, but {getattr(self, name)} was given")
        if self.minutes and self.fsdp:
            raise UsageError(
                "--minutes times steps that are then undone, which --fsdp does not support: use --max_steps"
            )
        if self.minutes and self.max_steps:
            raise UsageError("--minutes and --max_steps both set the length of the run: omit one")
        if self.posthoc_ema and len(set(self.posthoc_ema)) != max(2, len(self.posthoc_ema)):
            widths = " ".join(map(str, self.posthoc_ema))
            raise UsageError(
                f"--posthoc_ema {widths}: expected two or more different relative widths, such as 0.05 0.10, because one alone "
                "does not determine other widths"
            )
        if self.posthoc_ema_every and not self.posthoc_ema:
            raise UsageError("--posthoc_ema_every needs --posthoc_ema, for example --posthoc_ema 0.05 0.10")
        if self.fsdp and self.optimizer != "adamw":
            raise UsageError(
                f"--optimizer {self.optimizer} needs whole matrices, which --fsdp shards: use --optimizer adamw"
            )
        if self.batch_size % self.grad_accumulation:
            raise UsageError(
                f"--grad_accumulation {self.grad_accumulation} must divide --batch_size {self.batch_size}, because it splits "
                "the batch into equal parts"
            )

    def last_step(self, per_epoch: int) -> int:
        """The number of optimizer steps, given the steps per epoch."""
        return self.max_steps or self.num_epoch * per_epoch

    def rate_at(self, step: int, last_step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        schedule = "constant" if self.no_lr_decay else self.lr_schedule
        return learning_rate(schedule, self.lr, step, last_step, self.warmup_steps, FINAL_LEARNING_RATE)

    def note_long_warmup(self, steps: int) -> None:
        """Print a note if the learning rate's warmup does not end within the run's steps."""
        if 0 < steps <= self.warmup_steps:
            note(
                f"--warmup_steps {self.warmup_steps:,} outlasts the run's {steps:,} steps: the last learning rate is "
                f"{self.rate_at(steps - 1, steps):.3g}"
            )


@dataclass
class TrainingRun:
    """The components of a run, which `train` uses."""

    folder: Path
    network: nn.Module
    source: MomentSource
    autoencoder: Autoencoder
    header: Header
    objective: Objective
    training: TrainingOptions
    experiment: ExperimentOptions
    machine: Machine
    processes: Processes
    validation: Validation
    condition: ConditionSource | None = None
    features: MomentSource | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only its shard of the weights."""
        return self.training.fsdp and self.processes.count > 1
