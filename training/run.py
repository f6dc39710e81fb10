"""What the training loop works on, and the options of training."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from checkpoints.header import Header
from datasets_prep.conditions import ConditionSource
from datasets_prep.moments import MomentSource
from flow.paths import PathOptions
from models.autoencoders.protocol import Autoencoder
from options import option
from runtime.distributed import Processes
from runtime.precision import Machine
from training.experiment import ExperimentOptions
from training.optimizers import OptimizerOptions
from training.schedules import SCHEDULES, learning_rate
from training.validation import Review

__all__ = ["Job", "TrainingOptions"]

FINAL_LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class TrainingOptions(OptimizerOptions):
    """Training."""

    seed: int = option(1024, "seed of the initial weights and of every draw")
    batch_size: int = option(128, "images per process and step", minimum=1)
    grad_accumulation: int = option(1, "parts of that batch that go through the network one by one", minimum=1)
    fsdp: bool = option(False, "share the weights out among the processes (FSDP2), for networks that outgrow one GPU")
    num_epoch: int = option(1200, "passes over the training images", minimum=1)
    max_steps: int = option(0, "optimizer steps, instead of num_epoch; 0: by epochs", minimum=0)
    max_minutes: float = option(0.0, "stop after so many minutes (not reproducible); 0: never", minimum=0)
    lr_schedule: str = option(
        "cosine", "its course down to 1e-5; trapezoid falls over the last 40 %", choices=tuple(SCHEDULES)
    )
    no_lr_decay: bool = option(False, "constant learning rate")
    warmup_steps: int = option(0, "steps of linear warm-up", minimum=0)
    grad_clip: float = option(0.0, "largest gradient norm; 0: no clipping", minimum=0)
    use_ema: bool = option(True, "sample and save the moving average of the weights")
    ema_decay: float = option(0.9999, "decay of the moving average per step, after a warm-up", minimum=0, maximum=1)
    max_bad_steps: int = option(100, "stop after so many steps in a row without a finite gradient; 0: never", minimum=0)

    def last_step(self, per_epoch: int) -> int:
        """The number of optimizer steps, where an epoch has `per_epoch`."""
        return self.max_steps or self.num_epoch * per_epoch

    def rate_at(self, step: int, last_step: int) -> float:
        """The learning rate of optimizer step number `step`, from 0 on."""
        schedule = "constant" if self.no_lr_decay else self.lr_schedule
        return learning_rate(schedule, self.lr, step, last_step, self.warmup_steps, FINAL_LEARNING_RATE)


@dataclass
class Job:
    """What `train` works on."""

    folder: Path
    network: nn.Module
    source: MomentSource
    autoencoder: Autoencoder
    header: Header
    path: PathOptions
    training: TrainingOptions
    experiment: ExperimentOptions
    machine: Machine
    processes: Processes
    review: Review
    condition: ConditionSource | None = None

    @property
    def shares_out(self) -> bool:
        """Whether every process holds its part of the weights only."""
        return self.training.fsdp and self.processes.count > 1
