"""The contents of the files of one split, and how they become a dataset: labels, held-out rows and the report."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from datasets_prep.folder_layout.entries import examples
from datasets_prep.folder_layout.label_files import number_values
from datasets_prep.folder_layout.survey import Survey
from datasets_prep.formats.shards import Shards
from datasets_prep.image_dataset import DatasetFacts, ImageDataset, Split, listed_classes, rows_of_split
from datasets_prep.latents import LatentDataset
from models.autoencoders.statistics import LatentStatistics
from options import UsageError

__all__ = ["Content", "as_dataset"]

ReadImage = Callable[[int, int], torch.Tensor]
ReadLatents = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Content:
    """The labels of one split, and functions that read its images, its latents or both.

    Args:
        labels: a class id, a class name or None (no label) for each row.
        fingerprint: changes with the files.
        source: where the labels are from, such as "from .cls files".
        image: reads the image of a row as uint8 [3, size, size].
        latents: reads stored latents or moments [B, C, h, w] of rows [B], or of their mirror images [B].
        flips: whether mirror images are available.
        class_names: by label, if the files name the classes.
        statistics: of latents, if the files hold them.
        left_out: reports of parts that are not read, with reasons.
        warnings: for the user.
    """

    labels: Sequence[int | str | None]
    fingerprint: str
    source: str
    image: ReadImage | None = None
    latents: ReadLatents | None = None
    flips: bool = True
    class_names: tuple[str, ...] = ()
    statistics: LatentStatistics | None = None
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def as_dataset(name: str, shards: Shards, split: Split, size: int, train: Content, own: Content) -> ImageDataset:
    """The dataset of a split.

    Args:
        name: of the dataset.
        shards: the files of both splits.
        split: which of them.
        size: side of the images in pixels.
        train: the contents of the training files, whose labels decide how classes are numbered.
        own: the contents of this split's files; `train` itself if some of its rows are held out.

    Raises:
        UsageError: the split is empty, or a held-out image has a class that no training image has.
    """
    if not len(own.labels):
        raise UsageError(f"{shards.root} has no {split} images")
    labels, names, reason = _number_labels(train, own)
    rows = rows_of_split(len(labels), split) if own is train and not shards.held_out else np.arange(len(labels))
    survey = Survey(
        shards.root,
        tuple(names),
        own.source if names else "",
        reason,
        shards.rule(),
        (*shards.left_out(), *own.left_out),
        (*own.warnings, *_warn_of_classes(names, labels, shards)) if split == "train" else (),
    )
    facts = DatasetFacts(name, size, 3, None, own.flips, listed_classes(names))
    fingerprint = hashlib.sha256(f"{own.fingerprint} {len(rows)}".encode()).hexdigest()
    image = None if own.image is None else partial(_read_row, own.image, rows, size)
    if own.latents is None:
        assert image is not None
        return ImageDataset(facts, split, labels[rows], image, fingerprint, survey)
    return LatentDataset(
        facts,
        split,
        labels[rows],
        partial(_read_latents, own.latents, torch.from_numpy(rows)),
        fingerprint,
        survey=survey,
        statistics=own.statistics,
        image=image,
    )


def _read_row(read: ReadImage, rows: np.ndarray, size: int, index: int) -> torch.Tensor:
    return read(int(rows[index]), size)


def _read_latents(read: ReadLatents, rows: torch.Tensor, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    return read(rows[indices], mirrored)


def _number_labels(train: Content, own: Content) -> tuple[np.ndarray, list[str], str]:
    """Labels int64 [N], class names by label, and, without classes, an explanation.

    Raises:
        UsageError: a held-out image is of no training class.
    """
    none = np.zeros(len(own.labels), np.int64)
    missing = sum(label is None for label in train.labels)
    if missing == len(train.labels):
        return none, [], f"there are none {train.source}"
    if missing:
        return none, [], f"{missing:,} of {len(train.labels):,} images have none {train.source}"
    known: list[int | str] = [label for label in train.labels if label is not None]
    number_of, names = number_values(known)
    foreign = [label for label in own.labels if label not in number_of]
    if foreign:
        found = "no label" if foreign[0] is None else f"the class {foreign[0]!r}"
        raise UsageError(
            f"a held-out image has {found}, which no training image has: expected {examples(names)}; remove it"
        )
    numbers = np.array([number_of[label] for label in own.labels if label is not None], np.int64)
    return numbers, [*train.class_names, *names[len(train.class_names) :]], ""


def _warn_of_classes(names: list[str], labels: np.ndarray, shards: Shards) -> list[str]:
    counts = Counter(labels.tolist())
    if empty := [name for number, name in enumerate(names) if not counts[number]]:
        return [f"classes without training images in {shards.root}: {len(empty):,} ({examples(empty)})"]
    return []
