"""How scripts end: what a user can act on becomes one line on stderr with an exit code, and bugs keep their traceback."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

from options import Options, UsageError, recorded_options, wrapped
from streams import steady_output

__all__ = ["INTERRUPTED", "Explanation", "exit_cleanly", "explain", "guarded_imports"]

INTERRUPTED = 130  # exit code after Ctrl-C
LONGEST_MESSAGE = 1500  # characters
SYSTEM_ERROR = re.compile(r"\[Errno -?\d+\] ([^:()\[\]]+)(: '([^']+)')?")  # how Python prints an OSError
# Words in the errors of libraries when memory or threads run out, or when a product of sizes exceeds 64 bits.
EXHAUSTED = (
    "allocate memory", "not enough memory", "bad_alloc", "Storage size calculation overflowed",
    "integer multiplication overflow", "Overflow when unpacking", "array is too big", "Maximum allowed dimension exceeded",
    "start new thread",
)  # fmt: skip
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
# Errors of the file system, and what to do about them. Other errors of the system may be bugs.
FULL_DISK = "free some space, or choose another folder"
OTHER_DISK = "this file system cannot do what is needed; choose a folder on another one, such as a local disk"
LOST_DISK = "the disk or its connection failed; check it, then repeat the command"
OTHER_NAME = "choose another name"
ADVICE: dict[int, str] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), FULL_DISK),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions, or choose another place"),
    **dict.fromkeys((errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY), ""),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.EILSEQ, errno.ELOOP), OTHER_NAME),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENXIO), LOST_DISK
    ),
    **dict.fromkeys((errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EXDEV, errno.ENODEV, errno.EFBIG), OTHER_DISK),
    **dict.fromkeys((errno.EBUSY, errno.ETXTBSY), "another program uses it, or a disk is mounted there"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "too many files are open; raise the limit (ulimit -n)"),
}


class Explanation(NamedTuple):
    """A script's exit code, and the line it prints to stderr, after an error that is not a bug."""

    exit_code: int
    line: str


def explain(error: BaseException, options: Options | None = None) -> Explanation | None:
    """The explanation of an error that is not a bug; None for a bug, whose traceback matters.

    Args:
        error: the error.
        options: the script's options; the line may advise to change some.
    """
    if isinstance(error, UsageError):
        return Explanation(error.exit_code, _one_line(f"error: {_without_numbers(str(error))}"))
    if isinstance(error, KeyboardInterrupt):
        return Explanation(INTERRUPTED, "interrupted")
    if _gpu_memory_ran_out(error):
        return Explanation(
            2, _one_line(f"error: {'. '.join(str(error).split('. ')[:3]).rstrip('.')}: {_less_memory(options)}")
        )
    if isinstance(error, OSError) and (error.errno in ADVICE or (error.errno == errno.EINVAL and error.filename)):
        advice = ADVICE.get(error.errno, OTHER_NAME)
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "while writing"
        return Explanation(2, _one_line(f"error: {error.strerror}: {where}" + (f": {advice}" if advice else "")))
    if _memory_ran_out(error):
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Explanation(
            2, f"error: not enough memory: use smaller batches, images or networks, or fewer threads ({reason})"
        )
    return None


def _without_numbers(text: str) -> str:
    """The text with the system's errors in words only, and without a path after them that the text names before."""

    def words(error: re.Match[str]) -> str:
        reason, tail, path = error.groups(default="")
        return reason if path and path in text[: error.start()] else reason + tail

    return SYSTEM_ERROR.sub(words, text)


def _one_line(text: str) -> str:
    """The text without line breaks and, if it is very long, without its middle: libraries' errors and names can be."""
    line = " ".join(part.strip() for part in text.splitlines())
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 300]} ... {line[-300:]}"


def _memory_ran_out(error: BaseException) -> bool:
    """Whether memory or threads ran out. Libraries raise other errors for it too."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ValueError | TypeError) and any(words in str(error) for words in EXHAUSTED)


def _gpu_memory_ran_out(error: BaseException) -> bool:
    """Whether a GPU had too little memory. This module does not import torch, so it goes by names and messages."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def _less_memory(options: Options | None) -> str:
    """Advice after a GPU ran out of memory. It names only flags that the script has and that can still save memory."""
    values = {} if options is None else options.values
    trains = "grad_accumulation" in values  # other scripts accept a network's --use_grad_checkpointing without using it
    ways = [f"use a smaller --batch_size (now {values['batch_size']})"] if values.get("batch_size", 1) > 1 else []
    if trains:
        ways.append("--grad_accumulation N gives the same result with less memory")
        ways += [] if values.get("use_grad_checkpointing") else ["--use_grad_checkpointing recomputes activations"]
        ways += [] if values.get("fsdp") else ["--fsdp shards weights across several GPUs"]
    ways += ["--precision bf16 needs less"] if values.get("precision") == "fp32" else []
    ways = ways or ["use smaller batches, images or networks"]
    ways += ["if other programs use the GPU, choose another one with --device"] if "device" in values else []
    # Newer versions of torch also accept PYTORCH_ALLOC_CONF, but older ones know only this name.
    ways.append("if much memory is reserved but not allocated, set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    return "; ".join(ways)


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a script's main function and exit.

    A usage error becomes one line on stderr and exit code 2; a diverged run exits with code 3. Output that cannot be written
    is dropped.
    """
    with steady_output():
        try:
            sys.exit(main() or 0)
        except (Exception, KeyboardInterrupt) as error:
            if (reason := explain(error, recorded_options())) is None:
                raise
            print(wrapped(reason.line, sys.stderr), file=sys.stderr)
            sys.exit(reason.exit_code)


@contextmanager
def guarded_imports() -> Iterator[None]:
    """Exit with one line, not a traceback, if the imports in this block are interrupted or a package is not installed."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if find_spec(package) is not None:
            raise
        line = (
            f"error: {sys.executable} lacks the package {package}: run `source .venv/bin/activate` first, or install the "
            "requirements (README.md)"
        )
        print(wrapped(line, sys.stderr), file=sys.stderr)
        sys.exit(2)
