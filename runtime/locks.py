"""One process at a time in a folder; not by filelock, whose locks stop at the host or believe in processes that have ended.

The file names its holder and is created exclusively, which excludes other hosts on every file system. The holder also has the
kernel lock the file (flock) until it ends, however it ends, so a file of this host without that lock is left over. Another
host's file is believed, because many file systems keep kernel locks to one host.

filelock.FileLock has kernel locks alone. filelock.SoftFileLock (4.2) takes a zombie for a running process and replaces a file
that it cannot read; tests/faults/test_locks.py rules out both.
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

__all__ = ["Holder", "locked"]

SECONDS_BETWEEN_LOOKS = 1.0


class Holder(NamedTuple):
    """The process that a lock file names.

    `kernel_lock`: whether the kernel locks the file while the process runs. Not every file system can, and files of earlier
    versions do not say so.
    """

    host: str
    pid: int
    since: str
    kernel_lock: bool = False

    @classmethod
    def read(cls, path: Path) -> Self:
        """The holder that a file names.

        Raises:
            FileNotFoundError: there is no file.
            UsageError: it holds something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: content[name] for name in cls._fields if name in content})
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{path} says that a process is at work in the folder, but not which one ({error}): if none is, delete it"
            ) from error

    @property
    def is_provable(self) -> bool:
        """Whether this host can tell if the process has ended."""
        return self.kernel_lock and self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def locked(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file at `path` for the length of the block; its folder is made, and removed if it stays empty.

    Args:
        path: the file.
        what: what the holder does, for messages: "is training here".
        wait: until the holder has ended, instead of an error.

    Raises:
        UsageError: another process holds it.
    """
    told = False
    while isinstance(taken := _take(path), Holder):
        advice = "" if taken.is_provable else f"; if it is dead, delete {path}"
        if not wait:
            raise UsageError(f"{taken} {what}: {path.parent}. Wait for it, stop it, or choose another name{advice}")
        if not told:
            print(f"waiting: {taken} {what}: {path.parent}{advice}", flush=True)
            told = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    try:
        yield
    finally:
        _release(path, taken)


def _take(path: Path) -> TextIO | Holder:
    """Make the file, in place of one that a dead process left, and return it open until the release; else its holder."""
    with _one_at_a_time(path.parent):
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError, FileNotFoundError):  # another holds it, or has just removed the empty folder
                return _create(path)
            with suppress(FileNotFoundError):  # its holder has just removed it
                holder = Holder.read(path)
                if not _is_left_over(path, holder):
                    return holder
                path.unlink()
                print(f"note: {path.name} was left by a process that has ended ({holder}): removed", flush=True)


def _create(path: Path) -> TextIO:
    file = path.open("x", encoding="utf-8")
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = Holder(socket.gethostname(), os.getpid(), since, _lock(file, fcntl.LOCK_EX))
        json.dump(holder._asdict(), file)
        file.flush()
    except BaseException:  # a full disk, say
        path.unlink()
        with suppress(OSError):  # closing writes again what was not written
            file.close()
        raise
    return file


def _lock(file: TextIO, kind: int) -> bool:
    """Have the kernel lock the file until it is closed; returns whether it did."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a file system without such locks
        return False
    return True


def _is_left_over(path: Path, holder: Holder) -> bool:
    with path.open(encoding="utf-8") as file:
        return holder.is_provable and _lock(file, fcntl.LOCK_SH)


def _release(path: Path, file: TextIO) -> None:
    with file, suppress(FileNotFoundError):  # somebody deleted it
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else another process has taken the folder since
            path.unlink()
    with suppress(OSError):  # it is not empty
        path.parent.rmdir()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Serialise the processes of this host, so that none removes or reads what another is just making."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without kernel locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
