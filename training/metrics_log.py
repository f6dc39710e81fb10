"""The record of a run: metrics.jsonl and TensorBoard events, cut back to the step that a resumed run starts from; its clock."""

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
    """Appends one JSON object a line; entries beyond `step` (of an interrupted continuation) are dropped at the start."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line, step)]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Record `values` of one kind ("train", "validation", "skipped", "spike") at a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def past(self, kind: str, name: str) -> list[float]:
        """The values of one name in all entries of a kind so far."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        entries = [json.loads(line) for line in lines]
        return [entry[name] for entry in entries if entry["kind"] == kind and name in entry]

    def close(self) -> None:
        """Flush the events."""
        self._events.close()


class Clock:
    """Seconds and throughput of a run, across its resumptions."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._offset = state.seconds
        self._started = self._lap = self._saved = time.monotonic()
        self._lap_step = state.step

    def total(self) -> float:
        """Seconds of training so far."""
        return self._offset + time.monotonic() - self._started

    def since_saving(self) -> float:
        """Seconds since the start, or the last call of `saved`."""
        return time.monotonic() - self._saved

    def saved(self) -> None:
        """The whole state has just been saved."""
        self._saved = time.monotonic()

    def lap(self, images_per_step: int, processes: Processes) -> dict[str, float]:
        """Means over steps and processes since the last call, read from the device; the sums begin anew.

        After a resumption the sums hold steps of before it as well, but the throughput is that of the steps taken since.
        Skipped steps have no part in loss and norm; both are missing where there were no others.
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


def _step_of(line: str, limit: int) -> bool:
    try:
        return json.loads(line)["step"] <= limit
    except (ValueError, KeyError, TypeError):
        return False  # torn by a crash
