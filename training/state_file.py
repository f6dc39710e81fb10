"""The files of the training state: content.pth, and content.previous.pth in case it is damaged."""

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
    """Whether `folder` has a training state to resume from."""
    return any((folder / name).exists() for name in (CONTENT, PREVIOUS))


def save_state(folder: Path, content: Mapping[str, Any]) -> None:
    """Write content.pth and keep the previous one. If the process is killed, at least one of them is complete."""
    save_content(folder / CONTENT, content, folder / PREVIOUS)


def read_newest(path: Path, read: Callable[[Path], Any], processes: Processes) -> tuple[Path, Any]:
    """Read the training state at `path` or, if it is damaged, the previous one. All processes read the same file.

    A damaged content.pth is renamed to content.pth.damaged-<number>.

    Returns:
        The path of the file, and the result of `read`.

    Raises:
        UsageError: neither file can be read.
    """
    content, reason = _attempt(read, path)
    if not processes.any(reason is not None):
        return path, content
    del content  # frees its memory before the other file is read
    reason = reason or UsageError(f"another process cannot read {path}")
    previous = path.with_name(PREVIOUS)
    if not previous.exists():
        raise reason
    content, second = _attempt(read, previous)
    if processes.any(second is not None):
        raise UsageError(
            f"{reason}; the previous file is unreadable too: {second or previous}. Start over with --overwrite (the old run "
            "is moved aside), and keep its last weights with --init_from one of its checkpoints"
        )
    renamed = ""
    if processes.is_main and path.exists():
        renamed = f"; renamed to {move_aside(path, 'damaged').name}"
    warn(f"{reason}{renamed}. The run resumes from {previous.name}")
    return previous, content


def _attempt(read: Callable[[Path], Any], path: Path) -> tuple[Any, UsageError | None]:
    try:
        return read(path), None
    except UsageError as error:
        return None, error
