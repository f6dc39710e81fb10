"""Stop requests: Ctrl-C, SIGTERM and SIGUSR1 end a run at its next step, with everything saved."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["StopSignals", "orderly_exit"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def orderly_exit() -> Iterator[None]:
    """Make SIGTERM and SIGUSR1 exit through sys.exit during the block, so that `with` blocks release their resources.

    The exit code is 128 + the signal's number. Signals that already have a handler are left unchanged.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    deadly = [number for number in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(number) == signal.SIG_DFL]
    for number in deadly:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in deadly:
            signal.signal(number, signal.SIG_DFL)


class StopSignals:
    """Context manager that sets `requested` when a stop signal arrives, and restores the handlers on exit.

    Args:
        once: whether a second signal has its normal effect and stops the process at once. With several processes this must
            be false, because launchers and schedulers may each send the same signal.
    """

    def __init__(self, once: bool = True) -> None:
        self.requested = False
        self._once = once
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._once:
            signal.signal(number, self._before[signal.Signals(number)])
