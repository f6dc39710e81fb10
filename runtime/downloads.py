"""Folders and time limits of downloads."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["downloading_into"]

TIMEOUT_S = 10  # without an answer


@contextmanager
def downloading_into(folder: Path) -> Iterator[None]:
    """Create `folder` for a download and limit the wait for answers. A folder that stays empty is removed again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        socket.setdefaulttimeout(previous)
        for path in missing:
            with suppress(OSError):  # not empty, or never created
                path.rmdir()
