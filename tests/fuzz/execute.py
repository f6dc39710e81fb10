"""Runs a case in a forked copy of this process, in its own folder, and judges how it ended."""

import ctypes
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from exits import INTERRUPTED
from tests.fuzz.cases import Case, takes_long
from tests.fuzz.damage import apply_damage
from tests.fuzz.scripts import run_entry

__all__ = ["Verdict", "call_in_fork", "prepare", "run_case"]

SECONDS = 60  # for a case, and after that for its end on Ctrl-C
MEMORY_BYTES = 16 << 30
GOOD_CODES = frozenset((0, 2, 3, INTERRUPTED))
LONGEST_MESSAGE = 2000  # characters
MOST_LINES = 3
OVERRIDE = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root reads any file
CAPABILITY_VERSION = 0x20080522


class Verdict(NamedTuple):
    """How a case ended.

    Args:
        outcome: "success", "refused", "interrupted" or, for a failure, "failure".
        reason: what is wrong, "" if nothing.
        stderr: all that the script printed there.
        seconds: its duration.
    """

    outcome: str
    reason: str
    stderr: str
    seconds: float


def prepare(materials: Path, folder: Path) -> None:
    """Make `folder` a copy of the materials."""
    remove(folder)
    shutil.copytree(materials, folder, symlinks=True)


def remove(folder: Path) -> None:
    """Remove a folder, whatever its permissions."""
    if folder.exists():
        for parent, names, _ in os.walk(folder):
            for name in names:
                if not Path(parent, name).is_symlink():
                    Path(parent, name).chmod(0o755)
        shutil.rmtree(folder)


def run_case(case: Case, materials: Path, folder: Path) -> Verdict:
    """Run a case on a fresh copy of the materials in `folder`."""
    prepare(materials, folder)
    before = set(_unfinished(folder))

    def work() -> None:
        for path, kind, seed in case.damages:
            apply_damage(folder / path, kind, seed)
        run_entry(case.script, [*case.arguments])

    code, stderr, seconds, late = call_in_fork(work, folder)
    left = sorted(set(_unfinished(folder)) - before)
    reason = _reason(code, stderr, late and not takes_long(case))
    if not reason and left:
        reason = f"left unfinished: {left[0]}"
    outcome = "failure" if reason else {0: "success", INTERRUPTED: "interrupted"}.get(code, "refused")
    return Verdict(outcome, reason, stderr, seconds)


def call_in_fork(work: Callable[[], None], folder: Path) -> tuple[int, str, float, bool]:
    """Call `work` in a child process whose working directory is `folder`.

    Returns:
        The exit code (a signal's number is negative), stderr, the seconds it took, and whether it had to be interrupted.
    """
    output, errors = folder.with_name("stdout"), folder.with_name("stderr")
    started = time.monotonic()
    process = os.fork()
    if process == 0:
        _child(work, folder, output, errors)
    late = not _ended(process, SECONDS)
    if late:
        os.kill(process, signal.SIGINT)
        if not _ended(process, SECONDS):
            os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what it left behind
    text = errors.read_text(encoding="utf-8", errors="backslashreplace")
    return os.waitstatus_to_exitcode(status), text, time.monotonic() - started, late


def _ended(process: int, seconds: float) -> bool:
    descriptor = os.pidfd_open(process)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def _child(work: Callable[[], None], folder: Path, output: Path, errors: Path) -> None:
    """Call `work` as the interpreter would run a script, and end the process."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for path, stream in ((os.devnull, 0), (output, 1), (errors, 2)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), stream)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        tqdm._instances.clear()  # type: ignore[attr-defined]  # the campaign's bar
        _give_up_override()
        _cut_network()
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _give_up_override() -> None:
    """Let files' permissions hold for root too."""
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()
    if hasattr(library, "capget") and library.capget(header, sets) == 0:
        for number in (0, 1):
            sets[number] &= ~OVERRIDE
        library.capset(header, sets)


def _cut_network() -> None:
    def refuse(host: object, *others: object, **settings: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    socket.getaddrinfo = refuse  # type: ignore[assignment]


def _unfinished(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*.tmp*")]


def _reason(code: int, stderr: str, late: bool) -> str:
    """What is wrong with a script's end; "" if nothing."""
    message = stderr[stderr.rfind("error: ") :] if "error: " in stderr else ""
    if "Traceback (most recent call last)" in stderr:
        return "traceback: " + stderr.strip().splitlines()[-1][:300]
    if code not in GOOD_CODES:
        return f"exit code {code}"
    if late:
        return f"no end within {SECONDS} seconds"
    if code in (2, 3) and not message:
        return f"exit code {code} without an error message"
    if code in (2, 3) and len(message.strip().splitlines()) > MOST_LINES:
        return f"an error message of {len(message.strip().splitlines())} lines"
    if len(message) > LONGEST_MESSAGE:
        return f"an error message of {len(message)} characters"
    return ""
