"""The contract of every dataset: images by index, labels, facts, and a fingerprint of the files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

__all__ = ["LISTED_CLASSES", "DatasetFacts", "ImageDataset", "Split", "crop_padding"]

Split = Literal["train", "validation"]

LISTED_CLASSES = 100  # a checkpoint's header holds no longer list of names


@dataclass(frozen=True)
class DatasetFacts:
    """What a checkpoint remembers of its data.

    `crop` is the side that samples are cropped back to (None: no padding was added); `flips` tells whether mirror images
    belong to the distribution; `class_names` is empty without classes, or where they are more than LISTED_CLASSES.
    """

    name: str
    image_size: int
    channels: int
    crop: int | None
    flips: bool
    class_names: tuple[str, ...]


class ImageDataset:
    """Images uint8 [C, H, W] by index, labels int64 [N] (zeros without classes), facts and a fingerprint of the files.

    `labels` may be zeroed for an unconditional network; `stored_labels` int64 [N] are always those of the files.
    """

    def __init__(
        self,
        facts: DatasetFacts,
        split: Split,
        labels: np.ndarray,
        read: Callable[[int], torch.Tensor],
        fingerprint: str,
    ) -> None:
        self.facts = facts
        self.split = split
        self.stored_labels = labels.astype(np.int64)
        self.labels = torch.from_numpy(self.stored_labels.copy())
        self.fingerprint = fingerprint
        self._read = read

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._read(index)

    def check_images(self, purpose: str) -> None:
        """Nothing, unless this is a dataset without images, which `purpose` (a flag) needs.

        Raises:
            UsageError: there are no images.
        """

    def head(self, count: int) -> "ImageDataset":
        """The first `count` images."""
        labels = self.stored_labels[:count]
        return ImageDataset(self.facts, self.split, labels, self._read, f"{self.fingerprint}[:{len(labels)}]")


def crop_padding(images: torch.Tensor, facts: DatasetFacts) -> torch.Tensor:
    """Images [B, C, H, W] without the padding that the dataset added."""
    if facts.crop is None:
        return images
    border = (facts.image_size - facts.crop) // 2
    return images[..., border : border + facts.crop, border : border + facts.crop]
