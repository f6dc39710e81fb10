"""Folders of images, with or without class subfolders: any directory, and torchvision's layout of ImageNet."""

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets_prep.image_dataset import LISTED_CLASSES, DatasetFacts, ImageDataset, Split
from datasets_prep.images import IMAGE_SUFFIXES, read_image
from options import UsageError

__all__ = ["ClassFiles", "list_classes", "list_files", "list_split", "open_folder", "open_imagenet", "state_of_files"]

HELD_OUT_EVERY = 20  # without a validation folder, every twentieth image is held out
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "test")}
IMAGENET_TARS = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
NAMED_CLASSES = 10  # at most so many class names in an error message


class ClassFiles(NamedTuple):
    """The files of a split in order, their labels int64 [N], and the class names, indexed by label."""

    paths: list[Path]
    labels: np.ndarray
    classes: list[str]


def open_folder(name: str, datadir: Path, split: Split, image_size: int) -> ImageDataset:
    """Open any directory of images.

    If `train` and `validation` (or `val`, `test`) exist below it, they are the splits. Otherwise every twentieth image is
    held out.

    Raises:
        UsageError: a folder is missing or empty, or a validation image's class is not a training class.
    """
    files = list_split(datadir, split, IMAGE_SUFFIXES)
    return _as_dataset(name, split, image_size, files, state_of_files(files.paths, datadir, times=True))


def open_imagenet(name: str, datadir: Path, split: Split, image_size: int) -> ImageDataset:
    """Open `train/<wnid>/*.JPEG` or `val/<wnid>/*.JPEG`. Labels are indices into the sorted folders of `train`.

    Raises:
        UsageError: a folder is missing or empty.
    """
    folders = split_folders(datadir)
    if None in folders.values():
        tars = ", ".join(tar for tar in IMAGENET_TARS if (datadir / tar).is_file())
        found = f"only {tars}" if tars else "no such folders"
        raise UsageError(
            f"{name}: expected train/<wnid>/*.JPEG and val/<wnid>/*.JPEG in {datadir}, but found {found}. "
            f"Unpack the official archives with: python -m datasets_prep.unpack_imagenet --datadir {datadir}"
        )
    files = list_split(datadir, split, IMAGE_SUFFIXES)
    return _as_dataset(name, split, image_size, files, state_of_files(files.paths, datadir, times=False))


def list_split(root: Path, split: Split, suffixes: Collection[str], kind: str = "images") -> ClassFiles:
    """List the files of `split` below `root` that end in one of `suffixes`. Errors describe the files as `kind`.

    Raises:
        UsageError: see `open_folder`.
    """
    if not root.is_dir():
        raise UsageError(f"--datadir {root} is not a directory: name the folder that holds the {kind}")
    folders = split_folders(root)
    base = root
    if (train := folders["train"]) and (validation := folders["validation"]):
        base = train if split == "train" else validation
        paths = list_files(base, suffixes, kind)
        # Labels index the training classes in both splits, even if the split lacks images of some classes.
        classes = list_classes(train, suffixes)
    else:
        paths = list_files(root, suffixes, kind)
        if train and all(path.is_relative_to(train) for path in paths):
            base = train
        classes = list_classes(base, suffixes)
        if len(paths) > 1:
            every = min(HELD_OUT_EVERY, len(paths))
            paths = [p for i, p in enumerate(paths) if (i % every == every - 1) == (split == "validation")]
    return ClassFiles(paths, _labels(paths, base, classes), classes)


def split_folders(root: Path) -> dict[str, Path | None]:
    """The folder of each split below `root`; None if it does not exist."""
    return {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in SPLIT_FOLDERS.items()
    }


def list_files(folder: Path, suffixes: Collection[str], kind: str = "images") -> list[Path]:
    """List all files below `folder` that end in one of `suffixes` (in upper or lower case), sorted.

    Raises:
        UsageError: there are none.
    """
    paths = [
        Path(directory) / name
        for directory, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in suffixes  # noqa: PTH122 - pathlib is slow for a million files
    ]
    if not paths:
        raise UsageError(f"no {kind} in {folder}: expected files ending in {', '.join(sorted(suffixes))}")
    return sorted(paths)


def list_classes(folder: Path, suffixes: Collection[str]) -> list[str]:
    """List the names of the subfolders that contain files, sorted; empty if a file lies directly in `folder`.

    Only files that end in one of `suffixes` count.
    """
    entries = sorted(folder.iterdir())
    if any(entry.suffix.lower() in suffixes and entry.is_file() for entry in entries):
        return []
    return [
        entry.name
        for entry in entries
        if entry.is_dir() and any(path.suffix.lower() in suffixes for path in entry.rglob("*"))
    ]


def state_of_files(paths: list[Path], root: Path, *, times: bool) -> str:
    """SHA-256 over the files' names relative to `root`, their sizes and, with `times`, their modification times."""
    digest = hashlib.sha256()
    for path in paths:
        state = path.stat()
        changed = f" {state.st_mtime_ns}" if times else ""
        digest.update(f"{path.relative_to(root)} {state.st_size}{changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _labels(paths: list[Path], base: Path, classes: list[str]) -> np.ndarray:
    if not classes:
        return np.zeros(len(paths), dtype=np.int64)
    number_of = {name: number for number, name in enumerate(classes)}
    position = len(base.parts)
    names = [path.parts[position] for path in paths]
    for path, name in zip(paths, names, strict=True):
        if name not in number_of:
            more = ", ..." if len(classes) > NAMED_CLASSES else ""
            raise UsageError(
                f"{path} does not belong to a class of the training images ({', '.join(classes[:NAMED_CLASSES])}{more})"
            )
    return np.array([number_of[name] for name in names], dtype=np.int64)


def _as_dataset(name: str, split: Split, image_size: int, files: ClassFiles, fingerprint: str) -> ImageDataset:
    class_names = tuple(files.classes) if len(files.classes) <= LISTED_CLASSES else ()
    facts = DatasetFacts(name, image_size, 3, None, True, class_names)
    return ImageDataset(
        facts, split, files.labels, lambda index: read_image(files.paths[index], image_size), fingerprint
    )
