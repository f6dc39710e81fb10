"""The number of training steps that fit into a time, measured once at the start of a run and recorded in its folder."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from options import UsageError
from runtime.distributed import Processes
from runtime.files import read_json, write_json

__all__ = ["BUDGET", "Restorable", "recorded_steps", "steps_within", "undone"]

BUDGET = "budget.json"  # in the run folder: minutes, and the number of steps that fit into them
WARMUP_STEPS, TIMED_STEPS = 2, 10


class Restorable(Protocol):
    """A training state that can be saved and restored."""

    def content(self, processes: Processes) -> dict[str, Any]: ...  # noqa: D102
    def restore(self, content: dict[str, Any], processes: Processes) -> None: ...  # noqa: D102


@contextmanager
def undone(state: Restorable, processes: Processes = Processes()) -> Iterator[None]:  # noqa: B008
    """Undo the block's training steps at its end. The state must not be sharded, and every process must call this."""
    before = copy.deepcopy(state.content(processes))
    try:
        yield
    finally:
        state.restore(before, processes)


def steps_within(seconds: float, run_step: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> int:
    """The number of steps that fit into `seconds`, at least 1, given the mean time of TIMED_STEPS steps.

    WARMUP_STEPS steps before them are not timed, because they compile and allocate. The time of all these steps counts as a
    part of `seconds`.

    Args:
        seconds: the time, from now on, without other work such as validation.
        run_step: takes one step, and returns when the device has finished it. `undone` discards what the steps change.
        clock: the current time in seconds.
    """
    begun = clock()
    for _ in range(WARMUP_STEPS):
        run_step()
    started = clock()
    for _ in range(TIMED_STEPS):
        run_step()
    ended = clock()
    return max(1, int((seconds - (ended - begun)) / max((ended - started) / TIMED_STEPS, 1e-9)))


def recorded_steps(folder: Path, minutes: float, count: Callable[[], int], processes: Processes) -> int:
    """The number of steps that `folder` records for a budget of `minutes`; without a record, `count()`, which is recorded.

    Every process must call this, and gets the main process's number.

    Raises:
        UsageError: the record is damaged.
    """
    path, found = folder / BUDGET, None
    if processes.is_main and path.exists():
        try:
            stored = read_json(path)
            found = int(stored["steps"]) if float(stored["minutes"]) == minutes else None
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} does not record the number of steps ({error}): delete it to measure them again"
            ) from error
    found = processes.from_main(found)
    if found is None:
        found = processes.from_main(count())
        if processes.is_main:
            write_json(path, {"minutes": minutes, "steps": found})
    return found
