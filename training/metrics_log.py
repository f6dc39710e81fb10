"""Metrics of a run, written to metrics.jsonl and TensorBoard, and the run's clock."""

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from runtime.distributed import Processes
from runtime.files import atomic_path
from training.state import TrainingState

__all__ = ["Clock", "MetricsLog"]


class MetricsLog:
    """Appends metrics to metrics.jsonl, one JSON object per line, and to TensorBoard.

    Args:
        folder: the run folder.
        step: the step at which training starts or resumes. Later entries, written before an interruption, are removed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = [
                line
                for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines()
                if _is_up_to(step, line)
            ]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Record `values` at a step. Their kind is "train", "validation", "skipped" or "spike"."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def past(self, kind: str, name: str) -> list[float]:
        """All recorded values of this kind and name."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        entries = [json.loads(line) for line in lines]
        return [entry[name] for entry in entries if entry["kind"] == kind and name in entry]

    def close(self) -> None:
        """Flush and close the TensorBoard file."""
        self._events.close()


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


def _is_up_to(step: int, line: str) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # a crash left the line incomplete
