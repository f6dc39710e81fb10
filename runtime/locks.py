"""One process at a time in a folder: a file in it says which one, and a file that a dead process left is no obstacle.

The file names host, process number and time of start. Whether that process still runs can be told on its own host alone; two
processes of one number are told apart by the time that the kernel started them. Elsewhere the file is believed.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

from options import UsageError

__all__ = ["Holder", "locked"]

SECONDS_BETWEEN_LOOKS = 1.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Holder(NamedTuple):
    """The process that a lock file names.

    `identity` is the boot of the machine and the clock tick at which the kernel started the process; "" where that is not told.
    """

    host: str
    pid: int
    identity: str
    since: str

    @classmethod
    def this_process(cls) -> Self:
        """The one that asks."""
        return cls(socket.gethostname(), os.getpid(), _identity(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The holder that a file names; None where there is no file.

        Raises:
            UsageError: it holds something else.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{path} says that a process is at work in the folder, but not which one ({error}): if none is, delete it"
            ) from error

    @property
    def is_dead(self) -> bool:
        """Whether it certainly runs no more: false for one of another host."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        now = _identity(self.pid)
        return bool(self.identity and now) and self.identity != now

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
    path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while (holder := _take(path)) is not None:
        elsewhere = holder.host != socket.gethostname()
        advice = f"; if it is dead, delete {path}" if elsewhere else ""
        if not wait:
            raise UsageError(f"{holder} {what}: {path.parent}. Wait for it, stop it, or choose another name{advice}")
        if not told:
            print(f"waiting: {holder} {what}: {path.parent}{advice}", flush=True)
            told = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    try:
        yield
    finally:
        _release(path)


def _take(path: Path) -> Holder | None:
    """Make the file, in place of one that a dead process left; else who holds it."""
    with _one_at_a_time(path.parent):
        while True:
            holder = Holder.read(path)
            if holder is not None and not holder.is_dead:
                return holder
            if holder is not None:
                path.unlink()
                print(f"note: {path.name} was left by a process that has ended ({holder}): removed", flush=True)
            try:
                with path.open("x", encoding="utf-8") as file:
                    json.dump(Holder.this_process()._asdict(), file)
            except FileExistsError:  # another host was faster
                continue
            except OSError:  # a full disk
                path.unlink()
                raise
            return None


def _release(path: Path) -> None:
    with suppress(UsageError):  # it is another's, since ours was deleted
        holder, own = Holder.read(path), Holder.this_process()
        if holder is not None and holder[:3] == own[:3]:
            path.unlink()
    with suppress(OSError):  # it is not empty
        path.parent.rmdir()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lest two processes of a host find the same dead one, and the second removes what the first has made."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that cannot
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _identity(pid: int) -> str:
    """What tells a process from others that had or will have its number; "" where the kernel does not say."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        if after_name[0] in "ZX":
            return "none: it has ended, and is still listed"
        return f"{BOOT_ID.read_text(encoding='utf-8').strip()} {after_name[19]}"
    except (OSError, IndexError):
        return ""
