"""The files of a dataset that is stored in few large files: which belong to which split, and bytes at any position in them."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from datasets_prep.folder_layout.entries import examples, is_junk, subfolders
from datasets_prep.folder_layout.splits import TRAINING, NamedSplits, name_splits, split_names
from datasets_prep.image_dataset import Split
from options import UsageError

__all__ = ["FileBytes", "Files", "Shards", "find_shards", "fingerprint_of"]

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
        """The files of other splits, which are not read, for the report."""
        unused = [str(path.relative_to(self.root)) for path in self.unused]
        return (f"files of other splits: {len(unused):,} ({examples(unused)})",) if unused else ()


def find_shards(
    datadir: Path, suffixes: tuple[str, ...], accepts: Callable[[Path], bool] = lambda path: True
) -> Shards | None:
    """Find the files with one of `suffixes` that `accepts`: `datadir` itself, or files in it, in `data`, or in split folders.

    Splits are recognized by the names of folders or files, such as `train` and `validation`, or `train-00000.tar` and
    `val-00000.tar`. Returns None without such files.
    """
    if datadir.is_file():
        fits = datadir.name.lower().endswith(suffixes) and accepts(datadir)
        return Shards(datadir.parent, [datadir]) if fits else None
    if not datadir.is_dir():
        return None
    for folder in (datadir, datadir / WRAPPER):
        if found := {path.name: path for path in _files_in(folder, suffixes, accepts)}:
            named = split_names(found)
            unused = [path for name, path in found.items() if name not in (*named.train, *named.held_out)]
            return Shards(
                folder, [found[name] for name in named.train], [found[name] for name in named.held_out], unused
            )
    return _find_split_folders(datadir, suffixes, accepts)


def _find_split_folders(datadir: Path, suffixes: tuple[str, ...], accepts: Callable[[Path], bool]) -> Shards | None:
    """The files in folders named like splits. Other folders are not read, because they may hold millions of images."""
    names = subfolders(datadir)
    pairs = name_splits(names) or [NamedSplits([name for name in names if name.lower() in TRAINING], [])]
    for named in pairs:
        train, held_out = (
            [files for name in group if (files := _files_in(datadir / name, suffixes, accepts))] for group in named
        )
        if train:
            unused = [path for files in (*train[1:], *held_out[1:]) for path in files]
            return Shards(datadir, train[0], held_out[0] if held_out else [], unused)
    return None


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
    """Reads bytes at any position of local files. A file is open only while it is read: there may be thousands."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.names = list(map(str, paths))

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
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
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


def _files_in(folder: Path, suffixes: tuple[str, ...], accepts: Callable[[Path], bool]) -> list[Path]:
    """The files directly in `folder` with one of `suffixes` (in lower or upper case) that `accepts`, sorted."""
    if not folder.is_dir():
        return []
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(suffixes) and not is_junk(name))  # noqa: PTH208
    return [path for name in names if (path := folder / name).is_file() and accepts(path)]
