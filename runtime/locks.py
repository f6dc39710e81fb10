"""Lock files that allow one process at a time in a folder.

A lock file names its holder. It is created exclusively, which excludes other hosts on every file system. The holder also
keeps a kernel lock (flock) on the file until it ends, however it ends. A file from this host without a kernel lock is
therefore stale. A file from another host is trusted, because many file systems do not share kernel locks between hosts.

The filelock package is not sufficient. filelock.FileLock uses kernel locks only. filelock.SoftFileLock (4.2) mistakes a
zombie for a running process, and replaces a file that it cannot read; tests/faults/test_locks.py rules out both.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self, TextIO

from options import UsageError
from runtime.messages import note, show

__all__ = ["Holder", "locked"]

SECONDS_BETWEEN_LOOKS = 1.0


class Holder(NamedTuple):
    """The process named in a lock file.

    `kernel_lock` is true if the process also holds a kernel lock on the file. Some file systems do not support kernel
    locks, and files from earlier versions do not record them.
    """

    host: str
    pid: int
    since: str
    kernel_lock: bool = False

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the holder from a lock file.

        Raises:
            FileNotFoundError: the file does not exist.
            UsageError: the file does not name a holder.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: content[name] for name in cls._fields if name in content})
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"cannot read the lock file {path} ({error}): if no process is using its folder, delete the file"
            ) from error

    @property
    def is_provable(self) -> bool:
        """Whether this host can determine if the process has ended."""
        return self.kernel_lock and self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def locked(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file at `path` during the block; its folder is created, and removed if it stays empty.

    Args:
        path: the lock file.
        what: description of what the holder does, for messages, such as "is training here".
        wait: wait until the holder has ended, instead of raising an error.

    Raises:
        UsageError: another process holds the lock.
    """
    announced = False
    while isinstance(acquired := _acquire(path), Holder):
        advice = "" if acquired.is_provable else f"; if it has ended, delete {path}"
        if not wait:
            raise UsageError(f"{acquired}, {what}: {path.parent}. Wait for it, stop it, or choose another name{advice}")
        if not announced:
            show(f"waiting: {acquired}, {what}: {path.parent}{advice}")
            announced = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    try:
        yield
    finally:
        _release(path, acquired)


def _acquire(path: Path) -> TextIO | Holder:
    """Create the lock file, replacing a stale one, and return it open; if another process holds it, return that holder."""
    with _serialized(path.parent):
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another process holds the lock, or has just removed the empty folder.
            with suppress(FileExistsError, FileNotFoundError):
                return _create(path)
            with suppress(FileNotFoundError):  # the holder has just removed the file
                holder = Holder.read(path)
                if not _is_stale(path, holder):
                    return holder
                path.unlink()
                note(f"removed {path.name}, left by a process that has ended ({holder})")


def _create(path: Path) -> TextIO:
    file = path.open("x", encoding="utf-8")
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = Holder(socket.gethostname(), os.getpid(), since, _lock(file, fcntl.LOCK_EX))
        json.dump(holder._asdict(), file)
        file.flush()
    except BaseException as error:  # for example a full disk
        path.unlink()
        with suppress(OSError):  # closing repeats the failed write
            file.close()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return file


def _lock(file: TextIO, kind: int) -> bool:
    """Acquire a kernel lock that lasts until the file is closed; returns whether this succeeded."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a file system without kernel locks
        return False
    return True


def _is_stale(path: Path, holder: Holder) -> bool:
    with path.open(encoding="utf-8") as file:
        return holder.is_provable and _lock(file, fcntl.LOCK_SH)


def _release(path: Path, file: TextIO) -> None:
    with file, suppress(FileNotFoundError):  # a user deleted the file
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # otherwise another process holds the lock now
            path.unlink()
    with suppress(OSError):  # the folder is not empty
        path.parent.rmdir()


@contextmanager
def _serialized(folder: Path) -> Iterator[None]:
    """Serialize this host's processes, so that none reads or removes a lock file that another is creating."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without kernel locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
