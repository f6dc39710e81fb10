"""Files of torch.save: written atomically, read without ever executing what is in them."""

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

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # how files of torch.save begin, those since version 1.6 and the older ones


def is_torch_file(path: str | Path) -> bool:
    """Whether a file begins as those of torch.save do; False where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    # A safetensors file begins with the length of its header, which may look like anything, and then the header.
    return start.startswith((ZIP, PICKLE)) and start[8:] != b"{"


def read_torch_file(
    path: str | Path, device: torch.device | str = "cpu", allowed: tuple[type, ...] = (), mmap: bool = False
) -> Any:
    """What torch.save wrote, read with weights_only=True: tensors, plain values, and objects of the classes `allowed`.

    With `mmap` tensors stay in the file until they are used, so that many processes on a machine hold them once.

    Raises:
        UsageError: a torn or altered file, or one that holds more.
    """
    try:
        if zipfile.is_zipfile(path):  # torch does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} does not have its checksum")
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds for one thing: it cannot be read
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if match := re.search(r"GLOBAL (\S+)", str(error)):  # torch's own advice is to trust the file
            reason = f"it holds more than tensors and plain values ({match[1]}), which is never executed"
        raise UsageError(f"cannot read {path}: {reason}") from error


def save_content(path: str | Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write tensors, numbers, strings and containers of them, atomically; the old file is kept as `previous`, if named."""
    # The open file, since torch.save with a path would hide the kind of an OSError.
    with atomic_path(path, previous=previous) as temporary, temporary.open("wb") as file:
        torch.save(dict(content), file)


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
