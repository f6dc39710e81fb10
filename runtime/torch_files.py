"""Write torch.save files atomically, and read files of weights without executing code.

A file's format is recognized by its content, because suffixes are unreliable.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from options import UsageError
from runtime.files import UNREADABLE, atomic_path

__all__ = [
    "Unread",
    "explain_failure",
    "is_safetensors",
    "is_torch_file",
    "read_tensors",
    "read_torch_file",
    "save_content",
]

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of torch.save files since version 1.6, and of older ones
AGAIN = "copy or download it again"
# The first bytes of files that take the place of weights, and what to do.
OTHER_FILES = (
    ((b"version https://git-lfs",), "it is a Git LFS pointer, not the file itself: run `git lfs pull`, or download the file"),
    ((b"<!doctype", b"<html", b"<?xml"), "it is a web page, so its download failed: download the file itself"),
    ((b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"7z\xbc\xaf", b"rar!", b"\x28\xb5\x2f\xfd"), "it is an archive: unpack it first"),
    ((b"\x89hdf", b"\x93numpy"), "it is an HDF5 or numpy file: expected weights in safetensors or torch.save format"),
    ((b"{", b"["), "it is a JSON file: expected weights in safetensors or torch.save format"),
)  # fmt: skip
# Packages whose objects lie next to the weights in many projects' files: scores, paths, configurations.
PASSIVE_PACKAGES = frozenset(
    ("collections", "datetime", "lightning", "numpy", "omegaconf", "pathlib", "pytorch_lightning", "typing")
)
MOST_STAND_INS = 50


class Unread:
    """Stands in for an object of another package in a file. It keeps nothing of the object, and none of its code runs."""

    def __new__(cls, *arguments: Any, **named: Any) -> "Unread":
        """A new one, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def is_torch_file(path: str | Path) -> bool:
    """Whether a file starts like a torch.save file; False if it cannot be read."""
    start = _start(path, 9)
    # A safetensors file starts with the length of its header (eight arbitrary bytes), followed by the header.
    return start.startswith((ZIP, PICKLE)) and start[8:] != b"{"


def is_safetensors(path: str | Path) -> bool:
    """Whether a file starts like a safetensors file; False if it cannot be read."""
    start = _start(path, 9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < Path(path).stat().st_size


def read_tensors(path: str | Path, device: torch.device | str = "cpu", allowed: tuple[type, ...] = ()) -> Any:
    """Read a safetensors file as a state dict, or a torch.save file with `read_torch_file`.

    Raises:
        UsageError: the file is unreadable; the message says what it is, if it is another kind of file.
    """
    if not is_safetensors(path):
        return read_torch_file(path, device, allowed)
    try:
        return load_file(path, str(device))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {path}: {explain_failure(path, error)}") from error


def read_torch_file(
    path: str | Path, device: torch.device | str = "cpu", allowed: tuple[type, ...] = (), mmap: bool = False
) -> Any:
    """Read a torch.save file with weights_only=True: tensors, plain values, and objects of the `allowed` classes.

    Objects of PASSIVE_PACKAGES are read as `Unread`. With `mmap`, tensors stay in the file until they are used, so that the
    processes on a machine share one copy.

    Raises:
        UsageError: the file is truncated or corrupted, or holds other objects.
    """
    stand_ins: list[tuple[type, str]] = []
    try:
        if zipfile.is_zipfile(path):  # torch does not verify the checksums
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} does not match its checksum")
        while True:
            try:
                return _load(path, device, [*allowed, *stand_ins], mmap)
            except Exception as error:
                name = _refused_name(error)
                if name.partition(".")[0] not in PASSIVE_PACKAGES or len(stand_ins) == MOST_STAND_INS:
                    raise
                stand_ins.append((Unread, name))
    except Exception as error:  # torch raises various errors for unreadable files
        raise UsageError(f"cannot read {path}: {explain_failure(path, error)}") from error


def explain_failure(path: str | Path, error: Exception) -> str:
    """Why a file of weights could not be read: what it is instead, if that is recognized, else the error's first line."""
    if other := _describe_other(Path(path)):
        return other
    if name := _refused_name(error):  # torch's message suggests trusting the file
        return (
            f"it contains {name}; only tensors and plain values are read, and code is never executed. If you trust the file, "
            "load it where it was written, and save its state_dict() alone"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "weights_only" in reason:  # torch's advice, even for files that are not pickles
        return f"it is damaged, or it is not a torch.save file: {AGAIN}"
    return f"{reason} ({AGAIN})" if isinstance(error, SafetensorError) else reason


def save_content(path: str | Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Save tensors, numbers, strings and containers of them atomically; the old file is kept as `previous`, if given."""
    # Given a path instead of an open file, torch.save would hide the type of an OSError.
    with atomic_path(path, previous=previous) as temporary, temporary.open("wb") as file:
        torch.save(dict(content), file)


def _load(path: str | Path, device: torch.device | str, allowed: list[Any], mmap: bool) -> Any:
    with torch.serialization.safe_globals(allowed):
        if mmap:
            return torch.load(path, map_location=device, weights_only=True, mmap=True)
        with Path(path).open("rb") as file:  # given a path, torch.load would go by its suffix
            return torch.load(file, map_location=device, weights_only=True)


def _refused_name(error: Exception) -> str:
    """The name in the file that torch.load refused, or "" after another error."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    return match[1] if match else ""


def _describe_other(path: Path) -> str:
    """The kind of a file without weights, and what to do; "" if it may have weights or is missing."""
    if path.is_dir():
        return "it is a folder, but expected a file"
    start = _start(path, 64)
    if not start:
        return f"it is empty: {AGAIN}" if path.is_file() else ""
    if start.startswith(ZIP) and not is_safetensors(path):
        return _describe_zip(path)
    plain = start.lstrip().lower()
    return next((text for beginnings, text in OTHER_FILES if plain.startswith(beginnings)), "")


def _describe_zip(path: Path) -> str:
    """The state of a zip archive that torch.save did not write; "" if it did."""
    try:
        with zipfile.ZipFile(path) as archive:
            written = any(name.endswith("data.pkl") for name in archive.namelist())
    except UNREADABLE:
        return f"it is incomplete or damaged: {AGAIN}"
    return "" if written else "it is an archive: unpack it first"


def _start(path: str | Path, count: int) -> bytes:
    """The first `count` bytes of a file; none if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(count)
    except OSError:
        return b""
