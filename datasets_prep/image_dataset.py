"""The interface of every dataset: images by index, labels, facts, and a fingerprint of the files."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from datasets_prep.folder_layout.survey import Survey

__all__ = [
    "DatasetFacts",
    "ImageDataset",
    "Split",
    "crop_padding",
    "like_originals",
    "listed_classes",
    "rows_of_split",
    "shown_side",
]

Split = Literal["train", "validation"]

HELD_OUT_EVERY = 20  # every twentieth image is held out if no files are named as held out
LISTED_CLASSES = 100  # a checkpoint's header lists at most this many class names


@dataclass(frozen=True)
class DatasetFacts:
    """Properties of a dataset that a checkpoint records.

    Args:
        name: name of the dataset.
        image_size: side of the images in pixels.
        channels: channels of the images.
        crop: side to which samples are cropped; None if the dataset adds no padding.
        flips: whether mirror images belong to the distribution.
        class_names: by label; empty without classes or with more than LISTED_CLASSES.
    """

    name: str
    image_size: int
    channels: int
    crop: int | None
    flips: bool
    class_names: tuple[str, ...]


class ImageDataset:
    """Images uint8 [C, H, W] by index, with labels, facts and a fingerprint of the files.

    `labels` int64 [N] are zeros without classes, and may be zeroed for an unconditional network. `stored_labels` int64 [N]
    always keep the files' labels. `survey` says how a folder is read; it is None for other datasets. `has_images` is False for
    latents without images.
    """

    has_images = True

    def __init__(
        self,
        facts: DatasetFacts,
        split: Split,
        labels: np.ndarray,
        read: Callable[[int], torch.Tensor],
        fingerprint: str,
        survey: "Survey | None" = None,
    ) -> None:
        self.facts = facts
        self.split = split
        self.stored_labels = labels.astype(np.int64)
        self.labels = torch.from_numpy(self.stored_labels.copy())
        self.fingerprint = fingerprint
        self.survey = survey
        self._read = read

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._read(index)

    def check_images(self, purpose: str) -> None:
        """Check that the dataset has images, because `purpose` (such as a flag) needs them.

        Raises:
            UsageError: the dataset holds only latents.
        """

    def verify(self, index: int) -> None:
        """Read everything that belongs to one index.

        Raises:
            BadImageError: a file is damaged.
        """
        self[index]

    def subset(self, kept: np.ndarray) -> "ImageDataset":
        """The images with the indices `kept`, int64 [n]."""
        if np.array_equal(kept, np.arange(len(self))):
            return self
        return ImageDataset(
            self.facts,
            self.split,
            self.stored_labels[kept],
            lambda index: self[int(kept[index])],
            self.fingerprint_of_rows(kept),
            self.survey,
        )

    def fingerprint_of_rows(self, kept: np.ndarray) -> str:
        """The fingerprint of `subset(kept)`."""
        return hashlib.sha256(self.fingerprint.encode() + kept.tobytes()).hexdigest()

    def head(self, count: int) -> "ImageDataset":
        """The first `count` images."""
        labels = self.stored_labels[:count]
        fingerprint = f"{self.fingerprint}[:{len(labels)}]"
        return ImageDataset(self.facts, self.split, labels, self._read, fingerprint, self.survey)


def listed_classes(names: list[str]) -> tuple[str, ...]:
    """The class names that a checkpoint records: all, or none of more than LISTED_CLASSES."""
    return tuple(names) if len(names) <= LISTED_CLASSES else ()


def rows_of_split(count: int, split: Split) -> np.ndarray:
    """The rows int64 [n] of a split. Every twentieth of the `count` images is held out; a single image is in both splits."""
    rows = np.arange(count)
    if count < 2:
        return rows
    every = min(HELD_OUT_EVERY, count)
    return rows[(rows % every == every - 1) == (split == "validation")]


def shown_side(facts: DatasetFacts) -> int:
    """The side of the images in pixels, without the dataset's padding."""
    return facts.image_size if facts.crop is None else facts.crop


def crop_padding(images: torch.Tensor, facts: DatasetFacts) -> torch.Tensor:
    """Remove the dataset's padding from images [B, C, H, W]."""
    if facts.crop is None:
        return images
    border = (facts.image_size - facts.crop) // 2
    return images[..., border : border + facts.crop, border : border + facts.crop]


def like_originals(decoded: torch.Tensor, facts: DatasetFacts) -> torch.Tensor:
    """Convert decoded images uint8 [B, C, H, W] to the dataset's format: without padding, and grayscale if it is grayscale."""
    images = crop_padding(decoded, facts)
    if images.shape[1] > facts.channels == 1:
        images = images.float().mean(1, keepdim=True).round().to(torch.uint8)
    return images
