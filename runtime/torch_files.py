"""Write torch.save files atomically, and read them without executing code."""

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from options import UsageError
from runtime.files import atomic_path

__all__ = ["is_torch_file", "read_torch_file", "save_content", "weights_hash"]

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of torch.save files since version 1.6, and of older ones


def is_torch_file(path: str | Path) -> bool:
    """Whether a file starts like a torch.save file; False if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    # A safetensors file starts with the length of its header (eight arbitrary bytes), followed by the header.
    return start.startswith((ZIP, PICKLE)) and start[8:] != b"{"


def read_torch_file(
    path: str | Path, device: torch.device | str = "cpu", allowed: tuple[type, ...] = (), mmap: bool = False
) -> Any:
    """Read a torch.save file with weights_only=True: tensors, plain values, and objects of the `allowed` classes.

    With `mmap`, tensors stay in the file until they are used, so that the processes on a machine share one copy.

    Raises:
        UsageError: the file is truncated or corrupted, or holds other objects.
    """
    try:
        if zipfile.is_zipfile(path):  # torch does not verify the checksums
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} does not match its checksum")
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises various errors for unreadable files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if match := re.search(r"GLOBAL (\S+)", str(error)):  # torch's message suggests trusting the file
            reason = f"it contains {match[1]}; only tensors and plain values are read, and code is never executed"
        raise UsageError(f"cannot read {path}: {reason}") from error


def save_content(path: str | Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Save tensors, numbers, strings and containers of them atomically; the old file is kept as `previous`, if given."""
    # Given a path instead of an open file, torch.save would hide the type of an OSError.
    with atomic_path(path, previous=previous) as temporary, temporary.open("wb") as file:
        torch.save(dict(content), file)


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the names and values in a state dict."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
