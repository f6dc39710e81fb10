"""Outputs: checks before the work that they can be written, and results that are still printed if writing fails after it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from options import UsageError
from runtime.files import flush, free_bytes, is_special
from runtime.messages import warn

__all__ = [
    "check_file",
    "check_folder",
    "raise_unwritten",
    "record_failure",
    "warn_of_space",
    "with_unit",
    "write_error",
]

PROBE_BYTES = 4096  # a full disk may still create an empty file
UNWRITTEN = "unwritten"  # entry of a result
UNITS = ("B", "kB", "MB", "GB", "TB")


def write_error(folder: Path) -> str | None:
    """Why no file can be written into `folder`; None if it can. The folder is created."""
    if folder.exists() and not folder.is_dir():
        return "it is not a folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            flush(probe.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def check_folder(folder: str | Path, flag: str) -> None:
    """Check that files can be written into `folder`, which `flag` names or could name. The folder is created.

    Raises:
        UsageError: they cannot.
    """
    if (error := write_error(Path(folder))) is not None:
        raise UsageError(f"cannot write into {folder} ({error}): name another folder with {flag}")


def check_file(path: str | Path | None, flag: str, *, appended: bool = False) -> None:
    """Check that the file `path`, which `flag` names or could name, can be written. Its folder is created.

    A new file replaces an older one, which needs only a folder that can be written. A file that is `appended` to, a device or
    a pipe must be writable itself.

    Raises:
        UsageError: it cannot.
    """
    if not path:
        return
    path = Path(path)
    if path.is_dir():
        error: str | None = "it is a folder"
    elif is_special(path) or (appended and path.exists()):
        error = None if os.access(path, os.W_OK) else "it is read-only"
    else:
        error = write_error(path.parent)
    if error is not None:
        raise UsageError(f"cannot write {path} ({error}): name another file with {flag}")


def warn_of_space(folder: Path, needed: float, what: str) -> None:
    """Print a warning if `what`, of about `needed` bytes, does not fit into `folder`, which exists."""
    free = free_bytes(folder)
    if free is not None and needed > free:
        warn(f"{what} may need {with_unit(needed)} in {folder}, but only {with_unit(free)} is free")


@contextmanager
def record_failure(result: dict[str, Any]) -> Iterator[None]:
    """Record that the block could not write a file in `result`, which is then still printed, instead of raising OSError."""
    try:
        yield
    except OSError as error:
        result.setdefault(UNWRITTEN, []).append(f"{error.filename or 'a file'}: {error.strerror or error}")


def raise_unwritten(result: dict[str, Any]) -> None:
    """Raise the failures that `record_failure` has recorded in `result`, once it is printed.

    Raises:
        UsageError: there are some.
    """
    if failures := result.get(UNWRITTEN):
        raise UsageError(f"the result above is complete, but not all files could be written: {'; '.join(failures)}")


def with_unit(size: float) -> str:
    """A number of bytes with three digits and a unit."""
    for unit in UNITS[:-1]:
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} {UNITS[-1]}"
