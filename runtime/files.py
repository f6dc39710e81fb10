"""Atomic file writes: files are written under a temporary name, flushed to disk, then renamed."""

import errno
import json
import os
import pickle
import re
import shutil
import stat
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from options import UsageError, as_json

__all__ = [
    "UNREADABLE",
    "append_line",
    "atomic_path",
    "flush",
    "free_bytes",
    "is_special",
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
LONGEST_NAME = 255  # bytes of a file name, where the file system does not say
# Errors of fsync and of opening a folder on file systems that do not support them. A failed write is EIO, ENOSPC or EDQUOT.
NO_FLUSH = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR))
# Errors of renaming a file over another one, on file systems that only rename to a new name.
NO_REPLACE = frozenset((errno.EEXIST, errno.EBUSY, errno.ETXTBSY, errno.EPERM, errno.EACCES))


@contextmanager
def atomic_path(path: str | Path, durable: bool = True, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` if the block succeeds.

    Readers see the old file or the new one, never a partial one. With `durable`, this also holds after a power loss. On an
    error, the temporary file is removed. If `previous` is given, the replaced file is kept under that name, and at least
    one of the two is complete whenever the process ends.

    Raises:
        OSError: it names the file. ENOSPC if the disk is full, whichever error the writing library raised.
    """
    path = Path(path)
    if is_special(path):
        with _written_into(path) as temporary:
            yield temporary
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _with_suffix(path, f".tmp-{os.getpid()}")
    try:
        yield temporary
        if durable:
            _flush(temporary)
        if previous is not None and path.exists():
            _rename_copy(path, previous)
        _replace(temporary, path)
        if durable:
            _flush(path.parent)
    except Exception as error:
        _raise_reason(error, path)
        raise
    finally:
        with suppress(OSError):  # a lost connection; the error of the write says so
            temporary.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int | None:
    """Free space in bytes; None if the file system does not report it."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def write_json(path: str | Path, value: Any) -> None:
    """Write `value`, which may contain dataclasses and tuples, atomically as indented JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(as_json(value), indent=2) + "\n", encoding="utf-8")


def append_line(path: str | Path, line: str) -> None:
    """Append a line to a log in a single write; the file is created if necessary. A line that does not fit leaves no part.

    Raises:
        OSError: it names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    end = path.stat().st_size if path.is_file() else None
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")
    except OSError as error:
        if end is not None:
            with suppress(OSError):
                os.truncate(path, end)
        raise OSError(error.errno, error.strerror, str(path)) from error


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

    Raises:
        OSError: as `atomic_path` does.
    """
    folder = Path(folder)
    folder = folder.resolve() if folder.is_symlink() else folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _with_suffix(folder, f".tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same id
    temporary.mkdir()
    try:
        yield temporary
        old = move_aside(folder) if folder.exists() else None
        temporary.replace(folder)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        _raise_reason(error, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_aside(path: Path, word: str = "old", stays: str = "") -> Path:
    """Rename `path` to the first free `<name>.<word>-<number>` and return the new name.

    A symbolic link stays, and its target is renamed. A folder that cannot be renamed, such as a mount point or a folder of a
    container's image, stays, and its contents are moved.

    Args:
        path: a file or folder.
        word: what the new name says.
        stays: name of an entry that stays in the folder `path`, which is then created again.
    """
    path = path.resolve() if path.is_dir() else path
    number = 1
    while os.path.lexists(target := _with_suffix(path, f".{word}-{number}")):
        number += 1
    try:
        path.rename(target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY) or not path.is_dir():
            raise
        target.mkdir()
        for entry in sorted(path.iterdir()):
            if entry.name != stays:
                shutil.move(entry, target / entry.name)
        return target
    if stays and (target / stays).exists():
        path.mkdir()
        (target / stays).rename(path / stays)
    return target


def is_special(path: Path) -> bool:
    """Whether `path` is a device, a pipe or a name of an open file, such as /dev/stdout. No file may replace it."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    opened = path.parent in (Path("/dev"), Path("/dev/fd")) or path.is_relative_to("/proc")
    return opened or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def flush(descriptor: int) -> None:
    """Flush an open file or folder to the disk, as far as the file system supports this."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise


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


def _raise_reason(error: Exception, path: Path) -> None:
    """Raise the system's error behind a failed write of `path`, if there is one, with the name of the file."""
    free = free_bytes(path.parent)
    if free is not None and free < FULL_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
    if isinstance(error, UsageError):  # its message says more than the system's error behind it
        return
    cause = _system_error(error)
    if cause is not None and (cause is not error or cause.filename is None):
        raise OSError(cause.errno, cause.strerror, cause.filename or str(path)) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error behind an error that a library raised while it handled the former."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _with_suffix(path: Path, suffix: str) -> Path:
    """`path` with a suffix to its name, which is cut if the file system's longest name requires it."""
    try:
        longest = os.pathconf(path.parent, "PC_NAME_MAX")
    except (OSError, ValueError):
        longest = LONGEST_NAME
    name, room = os.fsencode(path.name), longest - len(suffix)
    if len(name) > room > 0:
        return path.with_name(name[:room].decode(errors="ignore") + suffix)
    return path.with_name(path.name + suffix)


@contextmanager
def _written_into(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and append its content to the device or pipe `path` if the block succeeds."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, path.name)
        yield temporary
        with temporary.open("rb") as source, path.open("ab") as target:
            shutil.copyfileobj(source, target)


def _replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; where no file can be renamed over another one, the old one first gets another name."""
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno not in NO_REPLACE or not path.is_file():
            raise
        replaced = _with_suffix(path, f".replaced.tmp-{os.getpid()}")
        path.rename(replaced)
        try:
            temporary.rename(path)
        except OSError:
            replaced.rename(path)
            raise
        replaced.unlink()


def _rename_copy(path: Path, previous: Path) -> None:
    """Keep `path` as `previous` too, with a hard link where possible, so that `path` never disappears."""
    previous.unlink(missing_ok=True)
    try:
        previous.hardlink_to(path)
    except OSError:  # a file system without hard links
        path.replace(previous)


def _flush(path: Path) -> None:
    """Flush a closed file or a folder. Some file systems cannot open folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
        return
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)
