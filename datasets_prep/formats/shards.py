"""The files of a dataset that is stored in few large files: which belong to which split, and bytes at any position in them.

All positions are read with `os.pread`, which needs no lock: threads and forked processes may read one file at the same time.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from datasets_prep.folder_layout.entries import examples, is_junk, subfolders
from datasets_prep.folder_layout.splits import name_splits, split_names
from datasets_prep.image_dataset import Split
from options import UsageError

__all__ = ["FileBytes", "Files", "Shards", "find_folders", "find_shards", "fingerprint_of"]

SAMPLED_BYTES = 1 << 16
SAMPLED_PLACES = 3
WRAPPER = "data"  # the folder with the files in a Hugging Face repository


@dataclass(frozen=True)
class Shards:
    """The files of both splits.

    Args:
        root: the folder that holds them.
        train: the training files in order, or all files.
        held_out: the held-out files; empty if some of the training images are to be held out.
        unused: files of other splits.
    """

    root: Path
    train: list[Path]
    held_out: list[Path] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)

    def of_split(self, split: Split) -> list[Path]:
        """The files with the images of a split."""
        return self.held_out if split == "validation" and self.held_out else self.train

    def rule(self) -> str:
        """How the held-out images are chosen, for the report."""
        if not self.held_out:
            return "every twentieth"
        named = [str(path.relative_to(self.root)) for path in self.held_out]
        return f"from {examples(named)}"

    def left_out(self) -> tuple[str, ...]:
        """What is not read, for the report."""
        unused = [str(path.relative_to(self.root)) for path in self.unused]
        return (f"files of other splits: {len(unused):,} ({examples(unused)})",) if unused else ()


def find_shards(datadir: Path, matches: Callable[[Path], bool]) -> Shards | None:
    """Find the files that `matches` accepts: `datadir` itself, or the files in it, in `data`, or in folders of the splits.

    Splits are recognized by the names of folders or files, such as `train` and `validation`, or `train-00000.tar` and
    `val-00000.tar`. Returns None without such files.
    """
    if datadir.is_file():
        return Shards(datadir.parent, [datadir]) if matches(datadir) else None
    if not datadir.is_dir():
        return None
    for folder in (datadir, datadir / WRAPPER):
        if found := _files_in(folder, matches):
            named = split_names(found)
            unused = [path for name, path in found.items() if name not in (*named.train, *named.held_out)]
            return Shards(
                folder, [found[name] for name in named.train], [found[name] for name in named.held_out], unused
            )
    train, held_out, unused = find_folders(datadir, lambda folder: bool(_files_in(folder, matches)))
    if train is None:
        return None
    files = [list(_files_in(folder, matches).values()) for folder in (train, *held_out[:1])]
    return Shards(datadir, files[0], files[1] if held_out else [], [*held_out[1:], *unused])


def find_folders(datadir: Path, holds: Callable[[Path], bool]) -> tuple[Path | None, list[Path], list[Path]]:
    """The folders of the splits in `datadir` for which `holds` is true: for training, held out in order, and others.

    The first is None without a folder for training.
    """
    names = [name for name in subfolders(datadir) if holds(datadir / name)]
    for named in name_splits(names):
        others = [datadir / name for name in named.train[1:]]
        return datadir / named.train[0], [datadir / name for name in named.held_out], others
    named = split_names(names)
    only = named.train if len(names) == 1 and names[0].lower() in ("train", "training") else []
    return (datadir / only[0] if only else None), [], []


def fingerprint_of(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 over files' names, sizes and some of their bytes. A copy of the files has the same fingerprint."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root)} {size}\n".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            for place in range(SAMPLED_PLACES):
                file.seek(max(0, size - SAMPLED_BYTES) * place // (SAMPLED_PLACES - 1))
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


class Files(Protocol):
    """Files that are read at any position. `names` are for messages."""

    names: list[str]

    def open(self, number: int) -> BinaryIO:
        """Open file `number`, to read it from the beginning."""
        ...

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset` of file `number`.

        Raises:
            UsageError: the file cannot be read or is too short.
        """
        ...


class FileBytes:
    """Reads bytes at any position of files, which are opened when they are first needed."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.names = list(map(str, paths))
        self._opened: dict[int, int] = {}

    def __del__(self) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)

    def open(self, number: int) -> BinaryIO:
        """Open file `number`, to read it from the beginning."""
        return self.paths[number].open("rb")

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset` of file `number`.

        Raises:
            UsageError: the file has been removed or is too short.
        """
        path = self.paths[number]
        try:
            data = os.pread(self._descriptor(number), size, offset)
            while len(data) < size and (
                more := os.pread(self._descriptor(number), size - len(data), offset + len(data))
            ):
                data += more
        except OSError as error:
            raise UsageError(
                f"cannot read {path}: {error.strerror or error}; check the disk or its connection"
            ) from error
        if len(data) < size:
            raise UsageError(
                f"{path} is truncated: expected {size:,} bytes at byte {offset:,}, but found {len(data):,}; download or copy "
                "it again"
            )
        return data

    def _descriptor(self, number: int) -> int:
        if number not in self._opened:
            descriptor = os.open(self.paths[number], os.O_RDONLY)
            if self._opened.setdefault(number, descriptor) != descriptor:  # another thread was first
                os.close(descriptor)
        return self._opened[number]


def _files_in(folder: Path, matches: Callable[[Path], bool]) -> dict[str, Path]:
    """The files directly in `folder` that `matches` accepts, sorted, by their names without suffix."""
    if not folder.is_dir():
        return {}
    found = sorted(path for path in folder.iterdir() if not is_junk(path.name) and path.is_file() and matches(path))
    return {path.name: path for path in found}
