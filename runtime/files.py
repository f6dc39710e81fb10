"""Atomic file writes: files are written under a temporary name, flushed to disk, then renamed."""

import errno
import json
import os
import pickle
import re
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from options import UsageError, as_json

__all__ = [
    "UNREADABLE",
    "append_line",
    "atomic_path",
    "move_aside",
    "read_json",
    "remove_leftovers",
    "replace_folder",
    "write_json",
]

# The errors that pickle, numpy, zipfile, PIL and similar readers raise for a damaged or malicious file.
UNREADABLE = (
    OSError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
    ValueError, pickle.UnpicklingError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
FULL_BYTES = 1 << 16  # with less free space than this, a failed write is reported as a full disk


@contextmanager
def atomic_path(path: str | Path, durable: bool = True, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` if the block succeeds.

    Readers see the old file or the new one, never a partial one. With `durable`, this also holds after a power loss. On an
    error, the temporary file is removed. If `previous` is given, the replaced file is kept under that name, and at least
    one of the two is complete whenever the process ends.

    Raises:
        OSError: ENOSPC if the disk is full, whichever error the writing library raised.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        if durable:
            _flush(temporary)
        if previous is not None and path.exists():
            _rename_copy(path, previous)
        temporary.replace(path)
        if durable:
            _flush(path.parent)
    except Exception as error:
        if shutil.disk_usage(path.parent).free < FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value`, which may contain dataclasses and tuples, atomically as indented JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(as_json(value), indent=2) + "\n", encoding="utf-8")


def append_line(path: str | Path, line: str) -> None:
    """Append a line to a log in a single write; the file is created if necessary."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        UsageError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"cannot read {path}: expected a JSON object, but found a {type(value).__name__}")
    return value


@contextmanager
def replace_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a new folder to fill, and rename it to `folder` if the block succeeds.

    The old folder is renamed first and removed last, so that a crash never loses both.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same id
    temporary.mkdir()
    try:
        yield temporary
        old = move_aside(folder) if folder.exists() else None
        temporary.replace(folder)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_aside(path: Path, word: str = "old") -> Path:
    """Rename `path` to the first free `<name>.<word>-<number>` and return the new name."""
    number = 1
    while (target := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    return path.rename(target)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files that killed processes left in `folder`; no other process may be using it.

    Returns:
        The removed files. Temporary files of this process are kept.
    """
    left = [path for path in folder.glob("*.tmp-*") if re.search(r"\.tmp-\d+$", path.name) and path.is_file()]
    left = [path for path in left if not path.name.endswith(f".tmp-{os.getpid()}")]
    for path in left:
        path.unlink()
    return left


def _rename_copy(path: Path, previous: Path) -> None:
    """Keep `path` as `previous` too, with a hard link where possible, so that `path` never disappears."""
    previous.unlink(missing_ok=True)
    try:
        previous.hardlink_to(path)
    except OSError:  # a file system without hard links
        path.replace(previous)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
