"""Fashion-MNIST for semantic synthesis: the map is the garment's silhouette, filled with the number of its class."""

from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from datasets_prep.idx import open_idx
from datasets_prep.image_dataset import Split
from datasets_prep.label_maps.segmented_dataset import MapClasses, SegmentedDataset

__all__ = ["open_silhouettes", "silhouette"]

DARKEST = 20  # grey values above it belong to the garment
LARGEST_HOLE = 8  # pixels: buttons and black patterns are smaller, the openings of handles and sandals larger
IN_PLANE = ndimage.generate_binary_structure(2, 1)  # a pixel's four neighbours
NEIGHBOURS = np.stack([np.zeros_like(IN_PLANE), IN_PLANE, np.zeros_like(IN_PLANE)])  # none in other images


def open_silhouettes(name: str, datadir: Path, split: Split, image_size: int) -> SegmentedDataset:
    """Fashion-MNIST as `open_idx` has it, with maps of 11 classes: background, then the garments' ones.

    Raises:
        UsageError: as `open_idx`.
    """
    images = open_idx(name, datadir, split, image_size)

    maps = np.zeros(
        (len(images), image_size, image_size), np.uint8
    )  # filled at the first call, as a training calls often
    found = np.zeros(len(images), bool)

    def read_map(index: int) -> torch.Tensor:
        if not found[index]:
            garment = int(images.stored_labels[index]) + 1
            maps[index] = silhouette(images[index])[0].numpy() * np.uint8(garment)
            found[index] = True
        return torch.from_numpy(maps[index].copy())

    classes = MapClasses(("background", *images.facts.class_names))
    return SegmentedDataset(
        images.facts, split, images.stored_labels, images.__getitem__, images.fingerprint, classes, read_map
    )


def silhouette(images: torch.Tensor) -> torch.Tensor:
    """Which pixels belong to the garment: bool [..., H, W] of images uint8 [..., H, W].

    These are the pixels brighter than DARKEST, and enclosed groups of at most LARGEST_HOLE others.
    """
    bright = (images > DARKEST).cpu().numpy().reshape(-1, *images.shape[-2:])
    enclosed = ndimage.binary_fill_holes(bright, structure=NEIGHBOURS) & ~bright
    holes, _ = ndimage.label(enclosed, structure=NEIGHBOURS)
    filled = np.bincount(holes.ravel()) <= LARGEST_HOLE
    filled[0] = False  # no hole
    return torch.from_numpy(bright | filled[holes]).reshape(images.shape).to(images.device)
