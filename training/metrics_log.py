"""Metrics of a run, written to metrics.jsonl and a tracker such as TensorBoard, and the run's clock."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.distributed import Processes
from runtime.files import append_line, atomic_path
from runtime.messages import warn
from training.state import Progress
from training.tracking.trackers import TRACKERS, Tracker

__all__ = ["Clock", "MetricsLog"]


class MetricsLog:
    """Appends metrics to metrics.jsonl, one JSON object per line, and shows them in a tracker.

    Lines that cannot be written, for example on a full disk, are kept and written later. A failure of the tracker ends only
    the tracking.

    Args:
        folder: the run folder.
        step: the step at which training starts or resumes. Later entries, written before an interruption, are removed.
        tracker: key of training.tracking.trackers.TRACKERS.
    """

    def __init__(self, folder: Path, step: int, tracker: str = "tensorboard") -> None:
        self.path = folder / "metrics.jsonl"
        self._unwritten: list[str] = []
        if self.path.exists():
            lines = [
                line
                for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines()
                if _is_up_to(step, line)
            ]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._tracker: Tracker | None = None
        self._title = TRACKERS[tracker].title
        self._excepthook, threading.excepthook = threading.excepthook, self._report_in_thread
        with self._optional_tracking():
            self._tracker = TRACKERS[tracker](folder, step)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Record `values` at a step. Their kind is "train", "validation", "skipped" or "spike"."""
        self._append(json.dumps({"step": step, "kind": kind, **values}))
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        with self._optional_tracking():
            if self._tracker is not None and numbers:
                self._tracker.record(step, numbers)

    def past(self, kind: str, name: str) -> list[float]:
        """All recorded values of this kind and name."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        entries = [json.loads(line) for line in lines]
        values = [entry[name] for entry in entries if entry.get("kind") == kind and name in entry]
        return [value for value in values if isinstance(value, int | float)]  # the file may have been edited

    def close(self) -> None:
        """Close the tracker."""
        with self._optional_tracking():
            if self._tracker is not None:
                self._tracker.close()
        threading.excepthook = self._excepthook

    def _report_in_thread(self, failure: threading.ExceptHookArgs) -> None:
        """Print the traceback of a thread, except TensorBoard's, whose error reaches `_optional_events` too."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._excepthook(failure)

    def _append(self, line: str) -> None:
        try:
            append_line(self.path, "\n".join([*self._unwritten, line]))
            self._unwritten.clear()
        except OSError as error:
            if not self._unwritten:
                warn(f"cannot write {self.path} ({error.strerror}); its lines are written once this is possible again")
            self._unwritten.append(line)

    @contextmanager
    def _optional_tracking(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorBoard passes on all errors of its thread
            self._tracker = None
            warn(f"{self._title} is not written any more ({error}); {self.path.name} holds the same values")


class Clock:
    """Elapsed time and throughput of a run, including the time before it resumed."""

    def __init__(self, state: Progress) -> None:
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
        norm exclude skipped steps, as do auxiliary losses; all are missing if all steps were skipped.
        """
        loss, norm, skipped, steps, *others = processes.mean(self._state.sums.clone()).tolist()
        self._state.sums.zero_()
        now = time.monotonic()
        elapsed, self._lap = max(now - self._lap, 1e-9), now
        taken, self._lap_step = self._state.step - self._lap_step, self._state.step
        good = steps - skipped
        sums = {"loss": loss, "grad_norm": norm, **dict(zip(self._state.auxiliary, others, strict=True))}
        means = {name: value / good for name, value in sums.items()} if good > 0 else {}
        speed = {"images_per_s": taken * images_per_step / elapsed, "seconds": self.total()}
        return means | {"skipped": skipped} | speed


def _is_up_to(step: int, line: str) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # a crash left the line incomplete
