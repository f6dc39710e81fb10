"""Validates, saves and draws sample grids: at intervals of epochs, steps or minutes, at the end, and on interruption.

At the end, it also writes the report.
"""

import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoints.files import save_weights
from checkpoints.header import Header, PowerAverage
from evaluation.report.nearest import pair_with_nearest
from evaluation.report.page import ReportOptions, write_report
from runtime.attempts import Attempts
from runtime.files import move_aside
from runtime.messages import fact, show
from runtime.pictures import save_sheet
from runtime.processes.parallel import gather_state
from runtime.processes.signals import StopSignals
from training.averages.snapshots import FOLDER, snapshot_name, to_half_precision
from training.metrics_log import Clock, MetricsLog
from training.nan_guard import NanGuard
from training.resources import WriteGuard
from training.run import TrainingRun
from training.state import TrainingState
from training.state_file import CONTENT, save_state

__all__ = ["Checkpointer", "Requests", "remove_older", "set_checkpoints_aside"]

LOSS = "loss"
REPORT = "report.html"
NEIGHBOURS = "samples/neighbours.png"
STEPS_BETWEEN_POLLS = 10  # with several processes, because each poll waits for all of them


class Requests(NamedTuple):
    """Requests made by at least one process, because of a signal or by its clock.

    Args:
        stop: stop, because of a signal.
        out_of_time: end the run, because of --max_minutes.
        save: save the training state, because of --save_content_every_minutes.
        validate: validate, because of --eval_every_minutes.
        checkpoint: write a checkpoint model_<epoch>, because of --save_ckpt_every_minutes.
        draw: draw a sample grid, because of --plot_every_minutes.
    """

    stop: bool = False
    out_of_time: bool = False
    save: bool = False
    validate: bool = False
    checkpoint: bool = False
    draw: bool = False


# The option with the minutes between two times of each periodic work.
MINUTES = {
    "save": "save_content_every_minutes",
    "validate": "eval_every_minutes",
    "checkpoint": "save_ckpt_every_minutes",
    "draw": "plot_every_minutes",
}


class Checkpointer:
    """Validates, saves and draws sample grids when they are due. A file that cannot be written is an error only at the end.

    Args:
        run: the run.
        state: its state.
        log: the metrics log, in the main process only. Every process must call the methods, but only the main one writes.
        clock: the run's clock.
        per_epoch: steps per epoch.
        nan_guard: checks the weights before they are saved.
        snapshot_every: steps between snapshots of the power averages.
    """

    def __init__(
        self,
        run: TrainingRun,
        state: TrainingState,
        log: MetricsLog | None,
        clock: Clock,
        per_epoch: int,
        nan_guard: NanGuard,
        snapshot_every: int,
    ) -> None:
        self._run = run
        self._state = state
        self._log = log
        self._clock = clock
        self._per_epoch = per_epoch
        self._nan_guard = nan_guard
        self._snapshot_every = snapshot_every
        self._save_postponed = False
        self._attempts = Attempts(run.folder)
        self._guard = WriteGuard(run.folder)

    def poll(self, stop: StopSignals) -> Requests:
        """The requests of all processes. Several processes exchange them only every STEPS_BETWEEN_POLLS steps."""
        processes, options = self._run.processes, self._run.experiment
        if processes.count > 1 and self._state.step % STEPS_BETWEEN_POLLS:
            return Requests()
        out_of_time = 0 < self._run.training.max_minutes * 60 <= self._clock.total()
        due = {work: 0 < getattr(options, name) * 60 <= self._clock.since(work) for work, name in MINUTES.items()}
        return Requests(*processes.any_each(*Requests(stop.requested, out_of_time, **due)))

    def after_step(self, ended: bool, requests: Requests) -> None:
        """Validate, save and draw a sample grid, each if it is due.

        Raises:
            UsageError: the run ends, and weights or training state could not be written.
        """
        experiment, state = self._run.experiment, self._state
        evaluated = self._due("validate", experiment.eval_every, ended, requests.validate)
        saved = self._due("checkpoint", experiment.save_ckpt_every, ended, requests.checkpoint)
        state_saved = self._training_state_due(ended, requests)
        snapshot = bool(state.power_averages) and (ended or state.step % self._snapshot_every == 0)
        if evaluated or saved or state_saved or snapshot:
            self._nan_guard.check_weights()
        if evaluated:
            self._validate(ended)
            self._clock.finished("validate")
        if saved:
            self._save_model(f"model_{-(-state.step // self._per_epoch)}", ended)
            if self._log and experiment.keep_last:
                with self._guard.writing("model_*.safetensors"):
                    remove_older(self._run.folder, experiment.keep_last)
            self._clock.finished("checkpoint")
        if snapshot:
            self._save_snapshots(ended)
        if state_saved:
            content = state.content(self._run.processes)
            if self._log:
                with self._guard.writing(CONTENT):
                    save_state(self._run.folder, content)
            self._clock.finished("save")
        self._guard.check(last=ended or requests.stop)
        if self._due("draw", experiment.plot_every, ended, requests.draw):
            self._draw()
            self._clock.finished("draw")
        if ended and self._log:
            self._write_report()

    def _attempt(self, work: str) -> AbstractContextManager[None]:
        """A block whose failure does not end the run, unless other processes would wait for this one inside it."""
        return self._attempts.attempt(work, self._state.step) if self._run.processes.count == 1 else nullcontext()

    def _due(self, work: str, every: int, ended: bool, requested: bool) -> bool:
        """Whether periodic work is due: it was requested, `every` epochs are complete, or the run has ended.

        If an option gives the minutes between two times of this work, its epochs do not count.
        """
        return ended or requested or (not getattr(self._run.experiment, MINUTES[work]) and self._is_epoch(every))

    def _is_epoch(self, every: int) -> bool:
        """Whether a multiple of `every` epochs is complete."""
        epoch, position = divmod(self._state.step, self._per_epoch)
        return position == 0 and epoch % every == 0

    def _training_state_due(self, ended: bool, requests: Requests) -> bool:
        """Whether to save the training state now.

        While steps are skipped, a save is postponed until the next good step. A run that never recovers thus keeps a
        content.pth from before the skipped steps.
        """
        options, step = self._run.experiment, self._state.step
        every_steps = options.save_content_every_steps
        if requests.stop or not options.save_content:
            return requests.stop
        regular = step % every_steps == 0 if every_steps else ended or self._is_epoch(options.save_content_every)
        due = regular or requests.save or self._save_postponed
        if not due or ended:
            return ended
        self._save_postponed = bool(self._run.training.max_bad_steps and self._state.consecutive_skips[0] > 0)
        return not self._save_postponed

    def _draw(self) -> None:
        with self._attempt("the sample grid"):
            sheet = self._run.validation.preview(self._state.ema.network)
            if self._log:
                picture = f"samples/step_{self._state.step:07d}.png"
                with self._guard.writing(picture):
                    save_sheet(sheet.images, self._run.folder / picture, sheet.columns)
                if self._run.validation.grid.show_neighbours:
                    self._draw_neighbours(sheet.images)
                self._guard.check(last=False)

    def _draw_neighbours(self, samples: torch.Tensor) -> None:
        header, dataset = self._run.header, self._run.validation.dataset
        pairs = pair_with_nearest(samples, dataset, header.dataset.flips)
        with self._guard.writing(NEIGHBOURS):
            save_sheet(pairs.images, self._run.folder / NEIGHBOURS, pairs.columns)

    def _write_report(self) -> None:
        folder = self._run.folder
        with self._attempts.attempt("the report", self._state.step):
            write_report([folder], ReportOptions(output=str(folder / REPORT)))
            fact("report", str(folder / REPORT))

    def _validate(self, ended: bool) -> None:
        run, state, values = self._run, self._state, dict[str, float]()
        with self._attempt("the validation"):
            values = run.validation.evaluate(state.ema.network)
        if not values:
            return
        if self._log:
            self._log.write(state.step, "validation", values)
        show(f"step {state.step}: {_summary(values)}")
        if run.validation.criterion != state.best_of:
            state.best, state.best_of = math.inf, run.validation.criterion
        objective = run.processes.from_main(values["objective"])
        if objective < state.best:
            before, state.best = state.best, objective
            if not self._save_model("best", ended):
                state.best = before  # so that the next validation writes it

    def _save_model(self, name: str, ended: bool) -> bool:
        """Write a checkpoint; returns whether this succeeded, in all processes alike."""
        run, name = self._run, f"{name}.safetensors"
        weights = gather_state(self._state.ema.weights, keep=run.processes.is_main)
        if run.processes.is_main:
            with self._guard.writing(name):
                save_weights(run.folder / name, weights, self._header(ended))
        return not run.processes.from_main(self._guard.has_failed(name))

    def _save_snapshots(self, ended: bool) -> None:
        """Write a snapshot of each power average in half precision."""
        run, state = self._run, self._state
        own = state.network.state_dict(keep_vars=True)
        trained = {name for name, value in own.items() if value.requires_grad}
        for average in state.power_averages:
            weights = gather_state(average.weights, keep=run.processes.is_main)
            updates = int(average.updates)
            if run.processes.is_main and updates:  # 0 if all steps were skipped
                name = snapshot_name(average.sigma_rel, state.step)
                header = replace(self._header(ended), average=PowerAverage(average.sigma_rel, updates))
                with self._guard.writing(name):
                    save_weights(run.folder / name, to_half_precision(weights, trained), header)

    def _header(self, ended: bool) -> Header:
        step = self._state.step
        return self._run.header.at(step, -(-step // self._per_epoch), ended)


def _summary(values: Mapping[str, float]) -> str:
    """Validation results on one line: the loss, the loss in each quarter of t, and the score if there is one."""
    by_time = " ".join(f"{value:.3f}" for name, value in values.items() if name.startswith(f"{LOSS}_"))
    scores = [f"{name} {value:.4g}" for name, value in values.items() if not name.startswith((LOSS, "objective"))]
    return ", ".join([f"validation loss {values[LOSS]:.4f} (by quarter of t: {by_time})", *scores])


def set_checkpoints_aside(folder: Path) -> list[str]:
    """Rename the checkpoints, snapshots and metrics of a run that starts again; returns their new names.

    Without checkpoints and snapshots, nothing is renamed.
    """
    epochs = _epochs(folder)
    if not epochs and not (folder / FOLDER).exists():
        return []
    others = (folder / name for name in ("best.safetensors", FOLDER, "metrics.jsonl"))
    paths = [*(epochs[epoch] for epoch in sorted(epochs)), *others]
    return [move_aside(path).name for path in paths if path.exists()]


def remove_older(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` files model_<epoch>.safetensors. Other files, such as best.safetensors, stay."""
    epochs = _epochs(folder)
    for epoch in sorted(epochs)[:-keep_last]:
        epochs[epoch].unlink()


def _epochs(folder: Path) -> dict[int, Path]:
    """The checkpoints model_<epoch>.safetensors in a run folder, by epoch."""
    matches = ((path, re.fullmatch(r"model_(\d+)\.safetensors", path.name)) for path in folder.iterdir())
    return {int(match[1]): path for path, match in matches if match}
