"""Progress bars that are also readable in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar"]

LOG_INTERVAL_S = 30.0


def progress_bar(iterable: Iterable[Any] | None = None, **arguments: Any) -> tqdm:
    """tqdm with a live bar on a terminal, and an update every half minute if stderr is a file or pipe."""
    interval = 0.2 if sys.stderr.isatty() else LOG_INTERVAL_S
    return tqdm(iterable, mininterval=interval, maxinterval=max(10.0, interval), dynamic_ncols=True, **arguments)
