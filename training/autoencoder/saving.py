"""Validates, draws and saves an autoencoder in training: at intervals of minutes, at the end, and on interruption."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from runtime.attempts import Attempts
from runtime.messages import show
from runtime.pictures import save_sheet
from runtime.processes.signals import StopSignals
from training.autoencoder.output import posterior_statistics, save_autoencoder
from training.autoencoder.setup import AutoencoderRun
from training.autoencoder.state import AutoencoderState
from training.checkpointing import STEPS_BETWEEN_POLLS
from training.metrics_log import Clock, MetricsLog
from training.nan_guard import NanGuard
from training.resources import WriteGuard
from training.state_file import CONTENT, save_state

__all__ = ["NEWEST", "Due", "Saver"]

NEWEST = "autoencoder"  # folder in the run folder with the newest EMA weights


class Due(NamedTuple):
    """What at least one process finds due: to stop, because of a signal; to save; to validate."""

    stop: bool
    save: bool
    validate: bool


class Saver:
    """Validates and saves when it is due. A file that cannot be written is an error only at the end.

    Args:
        run: the run.
        state: its state.
        log: the metrics log, in the main process only. Every process must call the methods, but only the main one writes.
        clock: the run's clock.
        guard: checks the weights before they are saved.
    """

    def __init__(
        self, run: AutoencoderRun, state: AutoencoderState, log: MetricsLog | None, clock: Clock, guard: NanGuard
    ) -> None:
        self.validation = dict[str, float]()  # the latest
        self._run = run
        self._state = state
        self._log = log
        self._clock = clock
        self._guard = guard
        self._postponed = False
        self._validated = time.monotonic()
        self._attempts = Attempts(run.folder)
        self._writes = WriteGuard(run.folder)

    def poll(self, stop: StopSignals) -> Due:
        """What is due. Several processes exchange it only every STEPS_BETWEEN_POLLS steps."""
        options, processes = self._run.training, self._run.processes
        if processes.count > 1 and self._state.step % STEPS_BETWEEN_POLLS:
            return Due(False, False, False)
        save = options.save_minutes * 60 <= self._clock.since_saving()
        validate = 0 < options.validate_minutes * 60 <= time.monotonic() - self._validated
        return Due(*processes.any_each(stop.requested, save, validate))

    def after_step(self, ended: bool, due: Due) -> None:
        """Validate and save, each if it is due.

        A save is postponed while steps are skipped, so that a run that never recovers keeps a state from before them.

        Raises:
            UsageError: the run stops, and a file could not be written.
        """
        skipping = bool(self._run.training.max_bad_steps and (due.save or self._postponed) and self._is_skipping())
        save = ended or due.stop or ((due.save or self._postponed) and not skipping)
        self._postponed = skipping and not save
        validate = ended or due.validate
        if not (save or validate):
            return
        self._guard.check_weights()
        if validate:
            self._validate()
        if save:
            self._save()
        if ended or due.stop or validate:
            self._save_newest()
        self._writes.check(last=ended or due.stop)

    def _is_skipping(self) -> bool:
        return bool(self._state.consecutive_skips[0] > 0)

    def _attempt(self, work: str) -> AbstractContextManager[None]:
        """A block whose failure does not end the run, unless other processes would wait for this one inside it."""
        return self._attempts.attempt(work, self._state.step) if self._run.processes.count == 1 else nullcontext()

    def _validate(self) -> None:
        run, step, network = self._run, self._state.step, self._state.ema.network
        self._validated = time.monotonic()
        with self._attempt("the validation"):
            self.validation = run.held_out.measure(network, step)
            if self._log:
                self._log.write(step, "validation", self.validation)
            show(f"step {step}: PSNR {self.validation['psnr_db']:.2f} dB on {len(run.held_out.images)} held-out images")
        if self._log:
            picture = f"samples/step_{step:07d}.png"
            with self._attempt("the grid of reconstructions"):
                sheet = run.held_out.sheet(network)
                with self._writes.writing(picture):
                    save_sheet(sheet.images, run.folder / picture, sheet.columns)

    def _save(self) -> None:
        content = self._state.content(self._run.processes)
        if self._log:
            with self._writes.writing(CONTENT):
                save_state(self._run.folder, content)
        self._clock.saved()

    def _save_newest(self) -> None:
        """Save the EMA network, with the held-out images' statistics, because the training images' take longer."""
        if self._log:
            run, network = self._run, self._state.ema.network
            statistics = posterior_statistics(network, run.held_out.dataset, run.machine, shown=False)
            with self._writes.writing(NEWEST):
                save_autoencoder(network, run.folder / NEWEST, statistics, run.training, steps=self._state.step)
