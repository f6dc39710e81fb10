"""A training run: what the loop works on, and the options of training."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from checkpoints.header import Header
from datasets_prep.conditions import ConditionSource
from datasets_prep.moments import MomentSource
from flow.objectives import Objective
from models.autoencoders.protocol import Autoencoder
from options import option
from runtime.distributed import Processes
from runtime.precision import Machine
from training.experiment import ExperimentOptions
from training.optimizers import OptimizerOptions
from training.schedules import SCHEDULES, learning_rate
from training.validation import Validation

__all__ = ["TrainingOptions", "TrainingRun"]

FINAL_LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class TrainingOptions(OptimizerOptions):
    """Training."""

    seed: int = option(1024, "seed of the initial weights and of every draw", common=True)
    batch_size: int = option(128, "images per process and step", minimum=1, common=True)
    grad_accumulation: int = option(
        1, "parts of that batch that go through the network one by one", minimum=1, on_resume="rounding", common=True
    )
    fsdp: bool = option(
        False,
        "share the weights out among the processes (FSDP2), for networks that outgrow one GPU",
        on_resume="rounding",
    )
    num_epoch: int = option(1200, "passes over the training images", minimum=1, on_resume="on_request", common=True)
    max_steps: int = option(
        0, "optimizer steps, instead of num_epoch; 0: by epochs", minimum=0, on_resume="on_request", common=True
    )
    max_minutes: float = option(
        0.0, "stop after so many minutes (not reproducible); 0: never", minimum=0, on_resume="freely"
    )
    lr_schedule: str = option(
        "cosine",
        "its course down to 1e-5; trapezoid falls over the last 40 %",
        choices=SCHEDULES,
        on_resume="on_request",
    )
    no_lr_decay: bool = option(False, "constant learning rate", on_resume="on_request")
    warmup_steps: int = option(0, "steps of linear warm-up", minimum=0, on_resume="on_request", common=True)
    grad_clip: float = option(0.0, "largest gradient norm; 0: no clipping", minimum=0, on_resume="on_request")
    use_ema: bool = option(True, "sample and save the moving average of the weights")
    ema_decay: float = option(
        0.9999, "decay of the moving average per step, after a warm-up", minimum=0, maximum=1, common=True
    )
    max_bad_steps: int = option(
        100, "stop after so many steps in a row without a finite gradient; 0: never", minimum=0, on_resume="freely"
    )

    def last_step(self, per_epoch: int) -> int:
        """The number of optimizer steps, where an epoch has `per_epoch`."""
        return self.max_steps or self.num_epoch * per_epoch

    def rate_at(self, step: int, last_step: int) -> float:
        """The learning rate of optimizer step number `step`, from 0 on."""
        schedule = "constant" if self.no_lr_decay else self.lr_schedule
        return learning_rate(schedule, self.lr, step, last_step, self.warmup_steps, FINAL_LEARNING_RATE)


@dataclass
class TrainingRun:
    """What `train` works on: a folder, a network, data, options and the means to validate."""

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

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds its shard of the weights only."""
        return self.training.fsdp and self.processes.count > 1
