"""Metrics of a run, written to metrics.jsonl and TensorBoard, its failures that do not end it, and its clock."""

import json
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter

from options import DivergedError
from runtime.distributed import Processes
from runtime.files import append_line, atomic_path
from runtime.messages import warn
from training.state import TrainingState

__all__ = ["FAILURES", "Attempts", "Clock", "MetricsLog"]

FAILURES = "failures.log"


class Attempts:
    """Tries work that a run can do without, and warns once for each kind of work that fails.

    Args:
        folder: the run folder, whose FAILURES gets the tracebacks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reported = set[str]()

    @contextmanager
    def attempt(self, work: str, step: int) -> Iterator[None]:
        """Run the block.

        An error in it, except DivergedError, becomes a traceback in FAILURES and, the first time for this work, a warning.
        """
        try:
            yield
        except DivergedError:
            raise
        except Exception as error:
            with suppress(OSError):
                append_line(self._folder / FAILURES, f"step {step}: {work} failed\n{traceback.format_exc()}")
            if work not in self._reported:
                self._reported.add(work)
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                warn(
                    f"step {step}: {work} failed ({type(error).__name__}: {reason}). The run continues; later failures "
                    f"of this kind are only listed, with tracebacks, in {self._folder / FAILURES}"
                )


class MetricsLog:
    """Appends metrics to metrics.jsonl, one JSON object per line, and to TensorBoard.

    If a write fails, the run goes on with a warning: lines wait for the next write, and TensorBoard gets no more values.

    Args:
        folder: the run folder.
        step: the step at which training starts or resumes. Later entries, written before an interruption, are removed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self._lines() if _is_up_to(step, line)]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._step, self._waiting = step, ""
        self._attempts = Attempts(folder)
        self._events: SummaryWriter | None = None
        with self._attempts.attempt("opening the TensorBoard file", step):
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            _silence_writer_thread()

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Record `values` at a step. Their kind is "train", "validation", "skipped" or "spike"."""
        self._step = step
        self._waiting += json.dumps({"step": step, "kind": kind, **values}) + "\n"
        with self._attempts.attempt("writing metrics.jsonl", step):
            self._append()
        events, self._events = self._events, None  # until the values are written
        with self._attempts.attempt("writing TensorBoard's file", step):
            for name, value in values.items():
                if isinstance(value, int | float) and events:
                    events.add_scalar(f"{kind}/{name}", value, step)
            self._events = events

    def past(self, kind: str, name: str) -> list[float]:
        """All recorded values of this kind and name."""
        entries = [json.loads(line) for line in (self._lines() if self.path.exists() else [])]
        found = [entry[name] for entry in entries if entry.get("kind") == kind and name in entry]
        return [value for value in found if isinstance(value, int | float)]

    def close(self) -> None:
        """Write what could not be written before, and close the TensorBoard file."""
        if self._waiting:
            with self._attempts.attempt("writing metrics.jsonl", self._step):
                self._append()
        if self._events:
            with self._attempts.attempt("writing TensorBoard's file", self._step):
                self._events.close()

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines()

    def _append(self) -> None:
        """Append the waiting lines, all or none of them."""
        length = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._waiting)
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, length)
            raise
        self._waiting = ""


class Clock:
    """Elapsed time and throughput of a run, including the time before it resumed."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._offset = state.seconds
        self._started = self._lap = self._saved = time.monotonic()
        self._lap_step = state.step

    def total(self) -> float:
        """Seconds of training so far."""
        return self._offset + time.monotonic() - self._started

    def since_saving(self) -> float:
        """Seconds since the last call of `saved`, or since the start."""
        return time.monotonic() - self._saved

    def saved(self) -> None:
        """Record that the training state has just been saved."""
        self._saved = time.monotonic()

    def lap(self, images_per_step: int, processes: Processes) -> dict[str, float]:
        """Read means over the steps since the last call from the device, average them over processes, and reset the sums.

        After a resume, the means include steps from before it, but the throughput counts only later steps. Loss and gradient
        norm exclude skipped steps; both are missing if all steps were skipped.
        """
        loss, norm, skipped, steps = processes.mean(self._state.sums.clone()).tolist()
        self._state.sums.zero_()
        now = time.monotonic()
        elapsed, self._lap = max(now - self._lap, 1e-9), now
        taken, self._lap_step = self._state.step - self._lap_step, self._state.step
        good = steps - skipped
        means = {"loss": loss / good, "grad_norm": norm / good} if good > 0 else {}
        speed = {"images_per_s": taken * images_per_step / elapsed, "seconds": self.total()}
        return means | {"skipped": skipped} | speed


def _silence_writer_thread() -> None:
    """Print no traceback from TensorBoard's thread: the next call of its writer raises the thread's error again."""
    previous = threading.excepthook

    def report(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.thread, _AsyncWriterThread):
            previous(arguments)

    threading.excepthook = report


def _is_up_to(step: int, line: str) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # a crash left the line incomplete
