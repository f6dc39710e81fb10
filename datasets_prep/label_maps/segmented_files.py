"""Datasets of image files with one label-map file per image."""

from pathlib import Path

import numpy as np
import torch

from datasets_prep.folders import state_of_files
from datasets_prep.image_dataset import DatasetFacts, Split
from datasets_prep.images import read_image, read_map
from datasets_prep.label_maps.segmented_dataset import MapClasses, SegmentedDataset
from options import UsageError

__all__ = ["open_segmented_files"]


def open_segmented_files(
    facts: DatasetFacts,
    split: Split,
    root: Path,
    images: list[Path],
    maps: list[Path],
    classes: MapClasses,
    remedy: str = "check that the dataset is complete",
) -> SegmentedDataset:
    """Open image files below `root` with the map files `maps`, in the same order.

    Raises:
        UsageError: maps are missing; the message ends with `remedy`.
    """
    if missing := [path for path in maps if not path.is_file()]:
        raise UsageError(
            f"{facts.name}: {len(missing)} of {len(maps)} label maps are missing, the first is {missing[0]}: {remedy}"
        )

    def read_labels(index: int) -> torch.Tensor:
        return read_map(maps[index], images[index], facts.image_size, classes.count)

    return SegmentedDataset(
        facts,
        split,
        np.zeros(len(images), np.int64),
        lambda index: read_image(images[index], facts.image_size),
        state_of_files(images, root, times=False),
        classes,
        read_labels,
        state_of_files(maps, root, times=True),
    )
