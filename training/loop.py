"""The training loop of LFM (Dao et al. 2023, algorithm 1): one read from top to bottom."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets_prep.moments import MomentSource
from evaluation.pictures import save_grid
from flow.paths import PathOptions
from models.autoencoder import Autoencoder, PixelSpace
from options import option
from runtime.checkpoints import save_content, save_weights
from runtime.distributed import Processes
from runtime.precision import Machine
from runtime.progress import progress_bar
from runtime.randomness import seed_for
from runtime.signals import StopSignals
from training.continuation import continue_run
from training.data import Batch, batches, steps_per_epoch
from training.experiment import ExperimentOptions, has_ended
from training.journal import Journal
from training.optimizers import OptimizerOptions
from training.parallel import replicate, share_out, whole
from training.review import Review
from training.schedules import SCHEDULES, learning_rate
from training.state import TrainingState

__all__ = ["Job", "TrainingOptions", "train"]

FINAL_LEARNING_RATE = 1e-5
STEPS_BETWEEN_POLLS = 10  # at which several processes ask each other whether to stop


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


@dataclass
class Job:
    """What `train` works on."""

    folder: Path
    network: nn.Module
    source: MomentSource
    autoencoder: Autoencoder | PixelSpace
    header: dict[str, Any]
    path: PathOptions
    training: TrainingOptions
    experiment: ExperimentOptions
    machine: Machine
    processes: Processes
    review: Review
    compile: bool = False

    @property
    def shares_out(self) -> bool:
        """Whether every process holds its part of the weights only."""
        return self.training.fsdp and self.processes.count > 1


def train(job: Job, resume: bool) -> bool:
    """Train to the last step, or until interrupted; returns whether the run is complete.

    Args:
        job: network, data, options, and what to call now and then.
        resume: continue from the folder's content.pth, where there is one.
    """
    options, experiment, processes = job.training, job.experiment, job.processes
    whole_batch = options.batch_size * processes.count
    per_epoch = steps_per_epoch(len(job.source), whole_batch)
    last_step = options.max_steps or options.num_epoch * per_epoch

    # Where the run stands.
    state = _state(job, resume, per_epoch, last_step)
    if state is None or 0 < options.max_minutes * 60 <= state.seconds:
        return True  # it has ended, or its time was up before
    velocity = _wrap(state.network, job)
    journal = Journal(job.folder, state.step) if processes.is_main else None
    clock = _Clock(state)

    # The steps.
    schedule = "constant" if options.no_lr_decay else options.lr_schedule
    ended = interrupted = False
    bar = progress_bar(total=last_step, initial=state.step, desc="training", unit="step")
    with bar, StopSignals(once=processes.count == 1) as stop:
        for batch in _batches(job, state.step, last_step):
            torch.manual_seed(seed_for(options.seed, "dropout", state.step, processes.rank))
            rate = learning_rate(schedule, options.lr, state.step, last_step, options.warmup_steps, FINAL_LEARNING_RATE)
            state.advance(velocity, batch, job.path.sigma_min, rate, options.grad_clip, options.grad_accumulation)
            bar.update()

            if state.step % experiment.log_every == 0:
                values = clock.lap(whole_batch, processes) | {"lr": rate, "epoch": state.step / per_epoch}
                bar.set_postfix(loss=f"{values['loss']:.4f}", img_s=f"{values['images_per_s']:.0f}", refresh=False)
                if journal:
                    journal.write(state.step, "train", values)
            interrupted, out_of_time = _must_stop(job, state.step, stop, clock)
            ended = state.step == last_step or out_of_time
            state.seconds = clock.total()
            _keep(job, state, journal, per_epoch, ended, interrupted)
            if ended or interrupted:
                break

    # The end.
    if journal:
        journal.close()
    if ended and state.step < last_step:
        print(f"--max_minutes ended the run at step {state.step} of {last_step}: it is not reproducible")
    return ended or state.step >= last_step


def _state(job: Job, resume: bool, per_epoch: int, last_step: int) -> TrainingState | None:
    """The state at the start: new, or continued from content.pth; None where the run has ended and kept no content.

    Raises:
        UsageError: it ended before `last_step`, and cannot be continued.
    """
    options, content_path = job.training, job.folder / "content.pth"
    if resume and not content_path.exists():
        if has_ended(job.folder, last_step):
            return None
        print(f"{job.folder} has no content.pth to continue from: the run starts at its first step")
    decay = options.ema_decay if options.use_ema else 0.0
    place = partial(share_out, device=job.machine.device, processes=job.processes) if job.shares_out else None
    state = TrainingState(job.network, job.machine, decay, options, place)
    if resume and content_path.exists():
        print(continue_run(state, content_path, per_epoch, job.header, job.processes))
        print(f"continuing at step {state.step} of {last_step}", flush=True)
    return state


def _keep(
    job: Job, state: TrainingState, journal: Journal | None, per_epoch: int, ended: bool, interrupted: bool
) -> None:
    """Validate, draw and save what is due after this step, at the ends of epochs and of the run.

    All processes take part, and the one with the journal writes.
    """
    experiment = job.experiment
    epoch, position = divmod(state.step, per_epoch)

    def due(every: int) -> bool:
        return ended or (position == 0 and epoch % every == 0)

    if due(experiment.eval_every):
        values = job.review.evaluate(state.ema.network)
        if journal:
            journal.write(state.step, "validation", values)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"step {state.step}: {shown}", flush=True)
        if job.review.objective != state.best_of:
            state.best, state.best_of = math.inf, job.review.objective
        objective = job.processes.from_main(values["objective"])
        if objective < state.best:
            state.best = objective
            _save_model(job, state, "best", per_epoch, ended)
    if due(experiment.plot_every):
        picture = job.review.preview(state.ema.network)
        if journal:
            save_grid(picture, job.folder / "samples" / f"step_{state.step:07d}.png", job.review.num_classes)
    if due(experiment.save_ckpt_every):
        _save_model(job, state, f"model_{-(-state.step // per_epoch)}", per_epoch, ended)
    every_steps = experiment.save_content_every_steps
    content_due = ended or (state.step % every_steps == 0 if every_steps else due(experiment.save_content_every))
    if interrupted or (experiment.save_content and content_due):
        content = state.content(job.processes)
        if job.processes.is_main:
            save_content(job.folder / "content.pth", content)


class _Clock:
    """Seconds and throughput of a run, across its resumptions."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._offset = state.seconds
        self._started = self._lap = time.monotonic()

    def total(self) -> float:
        """Seconds of training so far."""
        return self._offset + time.monotonic() - self._started

    def lap(self, images_per_step: int, processes: Processes) -> dict[str, float]:
        """Means over steps and processes since the last call, read from the device; the sums begin anew."""
        loss, norm, skipped, steps = processes.mean(self._state.sums.clone()).tolist()
        self._state.sums.zero_()
        now = time.monotonic()
        elapsed, self._lap = max(now - self._lap, 1e-9), now
        good = max(1.0, steps - skipped)
        values = {"loss": loss / good, "grad_norm": norm / good, "skipped": skipped}
        return values | {"images_per_s": steps * images_per_step / elapsed, "seconds": self.total()}


def _wrap(network: nn.Module, job: Job) -> nn.Module:
    parallel = network if job.shares_out else replicate(network, job.processes)
    return torch.compile(parallel) if job.compile else parallel  # type: ignore[return-value]


def _batches(job: Job, first_step: int, last_step: int) -> Iterator[Batch]:
    return batches(
        job.source,
        job.autoencoder,
        job.path,
        batch_size=job.training.batch_size,
        first_step=first_step,
        last_step=last_step,
        seed=job.training.seed,
        flips=job.header["dataset"]["flips"],
        num_classes=job.header["num_classes"],
        label_dropout=job.header["network"].get("label_dropout", 0.0),
        device=job.machine.device,
        processes=job.processes,
    )


def _must_stop(job: Job, step: int, stop: StopSignals, clock: _Clock) -> tuple[bool, bool]:
    """Whether any process was interrupted, and whether the time is up for any."""
    if job.processes.count > 1 and step % STEPS_BETWEEN_POLLS:
        return False, False
    out_of_time = 0 < job.training.max_minutes * 60 <= clock.total()
    return job.processes.any(stop.requested), job.processes.any(out_of_time)


def _save_model(job: Job, state: TrainingState, name: str, per_epoch: int, ended: bool) -> None:
    weights = whole(state.ema.weights, keep=job.processes.is_main)
    if job.processes.is_main:
        position = {"step": state.step, "epoch": -(-state.step // per_epoch), "ended": ended}
        save_weights(job.folder / f"{name}.safetensors", weights, {**job.header, **position})
