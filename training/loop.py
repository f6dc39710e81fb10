"""The training loop of LFM (Dao et al. 2023, algorithm 1)."""

import math
from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import partial

import torch
from torch import nn

from flow.auxiliary.objective import auxiliary_names
from flow.objectives import OBJECTIVES
from models.registry import NETWORKS
from runtime.messages import fact, note, warn
from runtime.processes.parallel import replicate, shard
from runtime.processes.signals import StopSignals
from runtime.progress import progress_bar
from runtime.randomness import seed_for
from runtime.weights import list_names
from training.averages.snapshots import remove_later, show_snapshots, snapshot_interval
from training.budget import (
    TIMED_STEPS,
    WARMUP_STEPS,
    Forecast,
    recorded_steps,
    since_start,
    steps_within,
    undone,
)
from training.checkpointing import Checkpointer, set_checkpoints_aside
from training.data import Batch, batches
from training.experiment import has_ended
from training.metrics_log import Clock, MetricsLog
from training.nan_guard import NanGuard
from training.reading.order import steps_per_epoch
from training.resources import check_space, predict_use, show_memory
from training.resume import resume_run
from training.run import TrainingRun
from training.state import TrainingState
from training.state_file import CONTENT, has_state

__all__ = ["train"]

OTHER_WORK = 0.06  # of the time of a run with --minutes, for validation, grids and saving
STOPPING = "stopping after the current step and any validation or sample grid in progress; the run is then saved"


def train(run: TrainingRun, resume: bool) -> bool:
    """Train to the last step or until interrupted; returns whether the run is complete.

    Args:
        run: network, data, options and validation.
        resume: resume from the run folder's content.pth if there is one.

    Raises:
        DivergedError: --max_bad_steps steps in a row had no finite gradient.
    """
    options, experiment, processes = run.training, run.experiment, run.processes
    global_batch = options.batch_size * processes.count
    per_epoch = steps_per_epoch(len(run.source), global_batch)
    last_step = options.last_step(per_epoch)

    # Set up.
    if processes.is_main:
        show_memory(run)
    state = _initial_state(run, resume, per_epoch, last_step)
    network = _called(run, state) if state is not None else run.network
    if options.minutes and state is not None:
        last_step = _steps_in_minutes(run, state, network)
    snapshot_every = snapshot_interval(options.posthoc_ema_every, last_step)
    if state is None or state.step >= last_step or 0 < options.max_minutes * 60 <= state.seconds:
        advice = "add --resume and raise --max_steps, --num_epoch, --minutes or --max_minutes"
        if state is None:
            advice = f"start another --exp with --init_from, because there is no {CONTENT}"
        note(f"the run has already ended; to train further, {advice}")
        return True
    if processes.is_main:
        fact("disk", check_space(run.folder, predict_use(state, experiment, per_epoch, last_step, snapshot_every)))
        if options.posthoc_ema:
            show_snapshots(run.folder, options.posthoc_ema, snapshot_every)
        fact("length", f"{last_step:,} steps of {global_batch} images, {last_step / per_epoch:.3g} epochs")
    log = MetricsLog(run.folder, state.step, experiment.tracker) if processes.is_main else None
    clock, forecast = Clock(state), Forecast(state.step, last_step)
    nan_guard = NanGuard(run, state, log, last_step)
    checkpointer = Checkpointer(run, state, log, clock, per_epoch, nan_guard, snapshot_every)

    # Train.
    ended = False
    bar = progress_bar(total=last_step, initial=state.step, desc="training", unit="step")
    stop = StopSignals(once=processes.count == 1, text=STOPPING if processes.is_main else "")
    with bar, closing(log) if log else nullcontext(), stop:
        for batch in _batches(run, state.step, last_step):
            torch.manual_seed(seed_for(options.seed, "dropout", state.step, processes.rank))
            rate = options.rate_at(state.step, last_step)
            state.advance(network, run.objective, batch, rate, options.grad_clip, options.grad_accumulation)
            bar.update()

            requests = checkpointer.poll(stop)
            ended = state.step == last_step or requests.out_of_time
            if state.step % experiment.log_every == 0:
                values = clock.lap(global_batch, processes) | {"lr": rate, "epoch": state.step / per_epoch}
                shown = f"{values.get('loss', math.nan):.4f}"
                bar.set_postfix(loss=shown, img_s=f"{values['images_per_s']:.0f}", refresh=False)
                if log:
                    log.write(state.step, "train", values)
                    forecast.print_once(state.step, global_batch)
                if "loss" in values:
                    nan_guard.report_loss(values["loss"])
            if ended or state.step % experiment.log_every == 0:
                nan_guard.report_skipped(ended)
            state.seconds = clock.total()
            checkpointer.after_step(ended, requests)
            if ended or requests.stop:
                break

    # Finish.
    if ended and state.step < last_step:
        note(f"--max_minutes ended the run at step {state.step} of {last_step}, so it is not reproducible")
    return ended or state.step >= last_step


def _called(run: TrainingRun, state: TrainingState) -> nn.Module:
    """The state's network as steps call it: replicated and compiled."""
    parallel = state.network if run.is_sharded else replicate(state.network, run.processes)
    return run.machine.compiled(parallel, always_alike=_calls_are_alike(run))


def _steps_in_minutes(run: TrainingRun, state: TrainingState, network: nn.Module) -> int:
    """The number of steps that fit into --minutes, from the record in the run folder, or measured now and recorded."""
    options = run.training

    def count() -> int:
        first = state.step
        timed = _batches(run, first, first + WARMUP_STEPS + TIMED_STEPS)
        rate = options.rate_at(first, first + 1)

        def run_step() -> None:
            state.advance(network, run.objective, next(timed), rate, options.grad_clip, options.grad_accumulation)
            state.sums[0].item()  # waits for the device

        with undone(state, run.processes):
            left = (options.minutes * 60 - (state.seconds or since_start())) * (1 - OTHER_WORK)
            return first + steps_within(left, run_step)

    steps = recorded_steps(run.folder, options.minutes, count, run.processes)
    fact("budget", f"{steps:,} steps end {options.minutes:g} minutes after the start of the first command")
    return steps


def _calls_are_alike(run: TrainingRun) -> bool:
    """Whether the network is called once per step, always with the same shapes."""
    one_call = run.processes.count == run.training.grad_accumulation == 1
    return one_call and not OBJECTIVES[run.header.objective].trains_averages


def _initial_state(run: TrainingRun, resume: bool, per_epoch: int, last_step: int) -> TrainingState | None:
    """Create a new state, or restore it from content.pth; None if the run is complete but has no content.pth.

    Raises:
        UsageError: the run ended before `last_step` and cannot resume.
    """
    options, restore = run.training, resume and has_state(run.folder)
    if resume and not restore:
        if has_ended(run.folder, last_step):
            return None
        note(f"{run.folder} has no {CONTENT} to resume from, so training starts at the first step")
        run.processes.barrier()  # all have read the checkpoints
        if run.processes.is_main and (kept := set_checkpoints_aside(run.folder)):
            warn(
                f"the checkpoints of the earlier start are kept as {list_names(kept)}; --init_from starts from one of them"
            )
    decay = options.ema_decay if options.use_ema else 0.0
    move = partial(shard, device=run.machine.device, processes=run.processes) if run.is_sharded else None
    matrices = NETWORKS[run.header.model_type].hidden_matrices
    names = auxiliary_names(run.objective)
    state = TrainingState(run.network, run.machine, decay, options, move, matrices, options.posthoc_ema, names)
    if restore:
        source = resume_run(state, run.folder / CONTENT, per_epoch, run.header, run.processes)
        of_all = "" if options.minutes else f" of {last_step}"
        fact("start", f"resuming at step {state.step}{of_all} from {source}")
        if run.processes.is_main:
            remove_later(run.folder, state.step)
    return state


def _batches(run: TrainingRun, first_step: int, last_step: int) -> Iterator[Batch]:
    return batches(
        run.source,
        run.autoencoder,
        run.objective,
        batch_size=run.training.batch_size,
        first_step=first_step,
        last_step=last_step,
        seed=run.training.seed,
        flips=run.header.dataset.flips,
        num_classes=run.header.num_classes,
        label_dropout=run.header.network.label_dropout,
        device=run.machine.device,
        processes=run.processes,
        condition=run.condition,
        condition_dropout=run.header.dense.dropout if run.header.dense else 0.0,
        path=run.header.path,
        features=run.features,
    )
