"""The loop of autoencoder training."""

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext

from evaluation.metrics import psnr
from runtime.messages import fact
from runtime.processes.signals import StopSignals
from runtime.progress import progress_bar
from training.autoencoder.data import PixelBatch, pixel_batches
from training.autoencoder.saving import Saver
from training.autoencoder.setup import AutoencoderRun
from training.autoencoder.state import AutoencoderState
from training.autoencoder.validation import VALIDATED
from training.budget import TIMED_STEPS, WARMUP_STEPS, recorded_steps, steps_within, undone
from training.loop import STOPPING
from training.metrics_log import Clock, MetricsLog
from training.nan_guard import NanGuard

__all__ = ["choose_last_step", "train"]


def choose_last_step(run: AutoencoderRun, state: AutoencoderState, started: float) -> int:
    """The number of steps of the run: --max_steps, or as many as fit into --minutes.

    Args:
        run: the run.
        state: its state.
        started: when the run was started, by time.monotonic().
    """
    options, processes = run.training, run.processes
    if not options.minutes:
        return options.max_steps

    def count() -> int:
        rate = options.rate_at(state.step, state.step + 1)
        batches = _batches(run, state.step, state.step + WARMUP_STEPS + TIMED_STEPS)

        def run_step() -> None:
            state.advance(run.loss_step, next(batches), rate)
            state.sums[0].item()  # waits for the device

        first = state.step
        with undone(state, processes):
            begun = time.monotonic()
            run.held_out.measure(state.ema.network, first)
            one = time.monotonic() - begun
            # The end measures the latents of all training images, which costs a third of a validation per image.
            validations = options.minutes / options.validate_minutes if options.validate_minutes else 0
            others = one * (1 + validations + len(run.source) / VALIDATED / 3)
            left = options.minutes * 60 - (state.seconds or time.monotonic() - started) - others
            return first + steps_within(left, run_step)

    steps = recorded_steps(run.folder, options.minutes, count, processes)
    fact("budget", f"{steps:,} steps in {options.minutes:g} minutes")
    return steps


def train(run: AutoencoderRun, state: AutoencoderState, last_step: int) -> dict[str, float] | None:
    """Train to the last step or until interrupted.

    Returns:
        The validation of the complete run; None if it was interrupted.

    Raises:
        DivergedError: --max_bad_steps steps in a row had no finite gradient.
        UsageError: the run stops, and a file could not be written.
    """
    options, processes = run.training, run.processes
    log = MetricsLog(run.folder, state.step, options.tracker) if processes.is_main else None
    clock = Clock(state)
    guard = NanGuard(run, state, log, last_step)
    saver = Saver(run, state, log, clock, guard)
    images_per_step = options.batch_size * processes.count
    ended = state.step >= last_step
    bar = progress_bar(total=last_step, initial=state.step, desc="autoencoder", unit="step")
    stop = StopSignals(once=processes.count == 1, text=STOPPING if processes.is_main else "")
    with bar, closing(log) if log else nullcontext(), stop:
        for batch in _batches(run, state.step, last_step):
            rate = options.rate_at(state.step, last_step)
            state.advance(run.loss_step, batch, rate)
            bar.update()

            due = saver.poll(stop)
            ended = state.step >= last_step
            if ended or state.step % options.log_every == 0:
                values = clock.lap(images_per_step, processes) | {"lr": rate}
                shown = psnr(values.get("squared_error", math.nan))
                bar.set_postfix(psnr=f"{shown:.1f} dB", img_s=f"{values['images_per_s']:.0f}", refresh=False)
                if log:
                    log.write(state.step, "train", values)
                if "loss" in values:
                    guard.report_loss(values["loss"])
                guard.report_skipped(ended)
            state.seconds = clock.total()
            saver.after_step(ended, due)
            if ended or due.stop:
                break
        else:
            saver.after_step(ended, saver.poll(stop))  # the run resumed at its last step
    return saver.validation if ended else None


def _batches(run: AutoencoderRun, first_step: int, last_step: int) -> Iterator[PixelBatch]:
    return pixel_batches(
        run.images,
        channels=run.coder.layout.image_channels,
        augmentations=run.training.augment,
        batch_size=run.training.batch_size,
        first_step=first_step,
        last_step=last_step,
        seed=run.training.seed,
        device=run.machine.device,
        processes=run.processes,
    )
