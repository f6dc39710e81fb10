"""Stop requests: Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU and SIGHUP end a run at its next step, with everything saved.

Batch systems send one of them before a job's time is over: Slurm SIGTERM or what --signal names, LSF SIGUSR2, Grid Engine
SIGUSR1, SIGUSR2 or SIGXCPU. SIGHUP, sent when a terminal closes, has no effect under nohup.
"""

import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["WARNINGS", "StopSignals", "hangup_is_ignored", "orderly_exit"]

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)  # of batch systems
SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS, signal.SIGHUP)


@contextmanager
def orderly_exit() -> Iterator[None]:
    """Make all of SIGNALS but SIGINT exit through sys.exit during the block, so that `with` blocks release their resources.

    The exit code is 128 + the signal's number. Signals that already have a handler are left unchanged.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    deadly = [number for number in SIGNALS[1:] if signal.getsignal(number) == signal.SIG_DFL]
    for number in deadly:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in deadly:
            signal.signal(number, signal.SIG_DFL)


def hangup_is_ignored() -> bool:
    """Whether this process was started by nohup, or in another way that ignores SIGHUP."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def _leave_terminal() -> None:
    """Send the output to /dev/null: writing to a closed terminal would end the run before it is saved."""
    with Path(os.devnull).open("w") as nowhere:
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere.fileno(), stream)


class StopSignals:
    """Context manager that sets `requested` when a stop signal arrives, and restores the handlers on exit.

    Args:
        once: whether a second signal has its normal effect and stops the process at once. With several processes this must
            be false, because launchers and schedulers may each send the same signal.
        text: line to print on stderr when the first signal arrives; empty: none.
    """

    def __init__(self, once: bool = True, text: str = "") -> None:
        self.requested = False
        self._once = once
        self._text = text
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        handled = [number for number in SIGNALS if not (number == signal.SIGHUP and hangup_is_ignored())]
        self._before = {number: signal.signal(number, self._request) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if number == signal.SIGHUP:
            _leave_terminal()
        if first and self._text:
            with suppress(OSError):  # a closed pipe
                os.write(2, f"\n{self._text}\n".encode())  # Python's streams must not be used in signal handlers
        if self._once:
            signal.signal(number, self._before[signal.Signals(number)])
