"""The training loop of LFM (Dao et al. 2023, algorithm 1): one read from top to bottom."""

import math
from collections.abc import Iterator
from functools import partial

import torch

from runtime.parallel import replicate, share_out
from runtime.progress import progress_bar
from runtime.randomness import seed_for
from runtime.signals import StopSignals
from training.checkpointing import Keeper
from training.clock import Clock
from training.data import Batch, batches, steps_per_epoch
from training.disk import check_space, predict_use
from training.experiment import has_ended
from training.metrics_log import Journal
from training.nan_guard import Anomalies
from training.resume import continue_run
from training.run import Job
from training.state import TrainingState
from training.state_file import CONTENT, has_content

__all__ = ["train"]


def train(job: Job, resume: bool) -> bool:
    """Train to the last step, or until interrupted; returns whether the run is complete.

    Args:
        job: network, data, options, and what to call now and then.
        resume: continue from the folder's content.pth, where there is one.

    Raises:
        DivergedError: the numbers have gone wrong for good.
    """
    options, experiment, processes = job.training, job.experiment, job.processes
    whole_batch = options.batch_size * processes.count
    per_epoch = steps_per_epoch(len(job.source), whole_batch)
    last_step = options.last_step(per_epoch)

    # Where the run stands.
    state = _state(job, resume, per_epoch, last_step)
    if state is None or 0 < options.max_minutes * 60 <= state.seconds:
        return True  # it has ended, or its time was up before
    if processes.is_main:
        print(check_space(job.folder, predict_use(state, experiment, per_epoch, last_step)), flush=True)
    parallel = state.network if job.shares_out else replicate(state.network, processes)
    velocity = job.machine.compiled(parallel, always_alike=processes.count == options.grad_accumulation == 1)
    journal = Journal(job.folder, state.step) if processes.is_main else None
    clock = Clock(state)
    keeper = Keeper(job, state, journal, clock, per_epoch)
    anomalies = Anomalies(job, state, journal, last_step)

    # The steps.
    ended = False
    bar = progress_bar(total=last_step, initial=state.step, desc="training", unit="step")
    with bar, StopSignals(once=processes.count == 1) as stop:
        for batch in _batches(job, state.step, last_step):
            torch.manual_seed(seed_for(options.seed, "dropout", state.step, processes.rank))
            rate = options.rate_at(state.step, last_step)
            state.advance(velocity, batch, job.path.sigma_min, rate, options.grad_clip, options.grad_accumulation)
            bar.update()

            requests = keeper.poll(stop)
            ended = state.step == last_step or requests.out_of_time
            if state.step % experiment.log_every == 0:
                values = clock.lap(whole_batch, processes) | {"lr": rate, "epoch": state.step / per_epoch}
                shown = f"{values.get('loss', math.nan):.4f}"
                bar.set_postfix(loss=shown, img_s=f"{values['images_per_s']:.0f}", refresh=False)
                if journal:
                    journal.write(state.step, "train", values)
                if "loss" in values:
                    anomalies.report_loss(values["loss"])
            if ended or state.step % experiment.log_every == 0:
                anomalies.report_skipped()
            state.seconds = clock.total()
            keeper.keep(ended, requests)
            if ended or requests.stop:
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
    options, goes_on = job.training, resume and has_content(job.folder)
    if resume and not goes_on:
        if has_ended(job.folder, last_step):
            return None
        print(f"{job.folder} has no {CONTENT} to continue from: the run starts at its first step")
    decay = options.ema_decay if options.use_ema else 0.0
    place = partial(share_out, device=job.machine.device, processes=job.processes) if job.shares_out else None
    state = TrainingState(job.network, job.machine, decay, options, place)
    if goes_on:
        print(continue_run(state, job.folder / CONTENT, per_epoch, job.header, job.processes))
        print(f"continuing at step {state.step} of {last_step}", flush=True)
    return state


def _batches(job: Job, first_step: int, last_step: int) -> Iterator[Batch]:
    return batches(
        job.source,
        job.autoencoder,
        job.path,
        batch_size=job.training.batch_size,
        first_step=first_step,
        last_step=last_step,
        seed=job.training.seed,
        flips=job.header.dataset.flips,
        num_classes=job.header.num_classes,
        label_dropout=job.header.network.label_dropout,
        device=job.machine.device,
        processes=job.processes,
        condition=job.condition,
        condition_dropout=job.header.dense.dropout if job.header.dense else 0.0,
    )
