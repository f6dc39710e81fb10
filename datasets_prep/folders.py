"""Folders of images, with or without class subfolders: any directory, and torchvision's layout of ImageNet."""

import hashlib
from collections import Counter
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets_prep.folder_layout.entries import FolderTree, read_tree
from datasets_prep.folder_layout.label_files import UNLABELED
from datasets_prep.folder_layout.labeling import Labeling, choose_labels, label_held_out
from datasets_prep.folder_layout.layout import Layout, find_layout
from datasets_prep.folder_layout.survey import Survey, survey_of
from datasets_prep.image_dataset import DatasetFacts, ImageDataset, Split, listed_classes, rows_of_split
from datasets_prep.images import IMAGE_SUFFIXES, read_image
from options import UsageError
from runtime.messages import note

__all__ = ["ClassFiles", "list_files", "list_split", "open_folder", "open_imagenet", "state_of_files"]

IMAGENET_TARS = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
LMDB_ADVICE = "for an LMDB, pass another --dataset (docs/datasets.md)"
NAMED_CLASSES = 10  # at most so many class names in an error message


class ClassFiles(NamedTuple):
    """The files of a split in order, their labels int64 [N], the class names by label, and how the folder is read."""

    paths: list[Path]
    labels: np.ndarray
    classes: list[str]
    survey: Survey


def open_folder(name: str, datadir: Path, split: Split, image_size: int) -> ImageDataset:
    """Open any directory of images. See `list_split`.

    Raises:
        UsageError: a folder is missing or empty.
    """
    files = list_split(datadir, split, IMAGE_SUFFIXES)
    return _as_dataset(name, split, image_size, files, state_of_files(files.paths, datadir, times=True))


def open_imagenet(name: str, datadir: Path, split: Split, image_size: int) -> ImageDataset:
    """Open `train/<wnid>/*.JPEG` or `val/<wnid>/*.JPEG`. Labels are indices into the sorted folders of `train`.

    Raises:
        UsageError: a folder is missing or empty, or a validation image's class is not a training class.
    """
    layout = find_layout(datadir, IMAGE_SUFFIXES) if datadir.is_dir() else None
    if layout is None or layout.held_out is None:
        tars = ", ".join(tar for tar in IMAGENET_TARS if (datadir / tar).is_file())
        found = f"only {tars}" if tars else "no such folders"
        raise UsageError(
            f"{name}: expected train/<wnid>/*.JPEG and val/<wnid>/*.JPEG in {datadir}, but found {found}. "
            f"Unpack the official archives with: python -m datasets_prep.unpack_imagenet --datadir {datadir}"
        )
    files = _files_of(layout, split, IMAGE_SUFFIXES, "images", strict=True)
    return _as_dataset(name, split, image_size, files, state_of_files(files.paths, datadir, times=False))


def list_split(root: Path, split: Split, suffixes: Collection[str], kind: str = "images") -> ClassFiles:
    """List the files of `split` below `root` that end in one of `suffixes`. Errors describe the files as `kind`.

    If the folders of both splits exist, such as `train` and `val`, they are the splits. Otherwise, and if no held-out file
    belongs to a training class, every twentieth file is held out. Labels come from label files or from class folders.

    Raises:
        UsageError: a folder is missing or empty.
    """
    if not root.is_dir():
        unpack = " (unpack an archive first)" if root.is_file() else ""
        raise UsageError(f"--datadir {root} is not a directory: name the folder that holds the {kind}{unpack}")
    return _files_of(find_layout(root, suffixes), split, suffixes, kind)


def list_files(folder: Path, suffixes: Collection[str], kind: str = "images") -> list[Path]:
    """List all files below `folder` that end in one of `suffixes` (in upper or lower case), sorted.

    A note says once what is left out.

    Raises:
        UsageError: there are none.
    """
    tree = read_tree(folder, suffixes)
    if not len(tree):
        raise _no_files(tree, suffixes, kind)
    tree.left_out.other_types = Counter(tree.left_out.unread_pictures())
    if phrases := tree.left_out.describe():
        _note_once(f"not read in {folder}: {'; '.join(phrases)}")
    return tree.paths


def state_of_files(paths: list[Path], root: Path, *, times: bool) -> str:
    """SHA-256 over the files' names relative to `root`, their sizes and, with `times`, their modification times."""
    digest = hashlib.sha256()
    for path in paths:
        state = path.stat()
        changed = f" {state.st_mtime_ns}" if times else ""
        digest.update(f"{path.relative_to(root)} {state.st_size}{changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files_of(
    layout: Layout, split: Split, suffixes: Collection[str], kind: str, *, strict: bool = False
) -> ClassFiles:
    """The files of a split. With `strict`, a held-out file of no training class is an error; otherwise it is left out."""
    if not len(layout.train):
        raise _no_files(layout.train, suffixes, kind)
    labeling, remarks = choose_labels(layout), list[str]()
    held_out = _held_out(layout, labeling, remarks, strict=strict)
    if held_out is not None and layout.held_out is not None:
        rule = f"from {layout.held_out.root.relative_to(layout.root)}"
        paths, labels = held_out if split == "validation" else _training(layout, labeling)
    else:
        rule = "every twentieth"
        paths, labels = _training(layout, labeling)
        chosen = rows_of_split(len(paths), split)
        paths, labels = [paths[number] for number in chosen], labels[chosen]
    survey = survey_of(layout, labeling, rule, remarks)
    return ClassFiles(paths, labels, labeling.classes, survey)


def _training(layout: Layout, labeling: Labeling) -> tuple[list[Path], np.ndarray]:
    paths = layout.train.paths
    return paths, labeling.number(paths, layout.train.root, layout.base)


def _held_out(
    layout: Layout, labeling: Labeling, remarks: list[str], *, strict: bool
) -> tuple[list[Path], np.ndarray] | None:
    """The files in the held-out folder that belong to training classes, and their labels; None if there are none."""
    if layout.held_out is None:
        return None
    paths, labels = label_held_out(labeling, layout.held_out)
    foreign = np.flatnonzero(labels == UNLABELED)
    if not len(foreign):
        return paths, labels
    first = paths[foreign[0]]
    if strict:
        more = ", ..." if len(labeling.classes) > NAMED_CLASSES else ""
        classes = ", ".join(labeling.classes[:NAMED_CLASSES])
        raise UsageError(f"{first} does not belong to a class of the training images ({classes}{more})")
    if len(foreign) == len(paths):
        remarks.append(
            f"{layout.held_out.root} is not used, because none of its {len(paths):,} files belongs to a training class; every "
            "twentieth training image is held out instead"
        )
        layout.unused.append(layout.held_out.root)
        return None
    remarks.append(f"held-out files of no training class, which are left out: {len(foreign):,} (the first is {first})")
    kept = np.flatnonzero(labels != UNLABELED)
    return [paths[number] for number in kept], labels[kept]


def _no_files(tree: FolderTree, suffixes: Collection[str], kind: str) -> UsageError:
    left_out = "; ".join(tree.left_out.describe())
    found = f" (not read: {left_out})" if left_out else ""
    advice = f"; {LMDB_ADVICE}" if ".mdb" in tree.left_out.other_types else ""
    return UsageError(
        f"no {kind} in {tree.root}: expected files ending in {', '.join(sorted(suffixes))}{found}{advice}"
    )


@cache
def _note_once(text: str) -> None:
    note(text)


def _as_dataset(name: str, split: Split, image_size: int, files: ClassFiles, fingerprint: str) -> ImageDataset:
    facts = DatasetFacts(name, image_size, 3, None, True, listed_classes(files.classes))
    return ImageDataset(
        facts,
        split,
        files.labels,
        lambda index: read_image(files.paths[index], image_size),
        fingerprint,
        files.survey,
    )
