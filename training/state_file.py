"""The files that an exact resume needs: content.pth, and the one before it in case the newest is damaged."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from options import UsageError
from runtime.distributed import Processes
from runtime.files import move_aside
from runtime.messages import warn
from runtime.torch_files import save_content

__all__ = ["CONTENT", "has_state", "read_newest", "save_state"]

CONTENT, PREVIOUS = "content.pth", "content.previous.pth"


def has_state(folder: Path) -> bool:
    """Whether a run in `folder` has something to go on from."""
    return any((folder / name).exists() for name in (CONTENT, PREVIOUS))


def save_state(folder: Path, content: Mapping[str, Any]) -> None:
    """Write content.pth, and keep the one before it; whenever the process is killed, one of them is whole."""
    save_content(folder / CONTENT, content, folder / PREVIOUS)


def read_newest(path: Path, read: Callable[[Path], Any], processes: Processes) -> tuple[Path, Any]:
    """The content.pth at `path` or, where that is damaged, the one before it: which it is, and what `read` made of it.

    All processes read the same one. A damaged content.pth is kept aside, as content.pth.damaged-<number>.

    Raises:
        UsageError: neither can be read.
    """
    content, reason = _attempt(read, path)
    if not processes.any(reason is not None):
        return path, content
    del content  # before another one takes its memory
    reason = reason or UsageError(f"another process cannot read {path}")
    previous = path.with_name(PREVIOUS)
    if not previous.exists():
        raise reason
    content, second = _attempt(read, previous)
    if processes.any(second is not None):
        raise UsageError(
            f"{reason}; nor the one before it: {second or previous}. Nothing is left to go on from: start anew with "
            "--overwrite (the old run is moved aside) and, to keep what was learnt, --init_from one of its checkpoints"
        )
    kept = ""
    if processes.is_main and path.exists():
        kept = f"; it is kept as {move_aside(path, 'damaged').name}"
    warn(f"{reason}{kept}. The run resumes from {previous.name}")
    return previous, content


def _attempt(read: Callable[[Path], Any], path: Path) -> tuple[Any, UsageError | None]:
    try:
        return read(path), None
    except UsageError as error:
        return None, error
