"""Seconds and throughput of a run."""

import time

from runtime.distributed import Processes
from training.state import TrainingState

__all__ = ["Clock"]


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
