"""Progress bars that are also readable in a log file."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ["progress_bar"]

LOG_INTERVAL_S = 30.0


class _Log:
    """A stream where each update of a bar is a line, because a log file cannot overwrite the last one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self._stream.write(f"{text}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(iterable: Iterable[Any] | None = None, **arguments: Any) -> tqdm:
    """tqdm with a live bar on a terminal, or a line every half minute if stderr is a file or pipe."""
    if sys.stderr.isatty():
        return tqdm(iterable, mininterval=0.2, dynamic_ncols=True, **arguments)
    interval = {"mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S}
    return tqdm(iterable, file=_Log(sys.stderr), ncols=100, **interval, **arguments)
