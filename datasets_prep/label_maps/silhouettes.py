"""Fashion-MNIST for semantic synthesis. The label map is the garment's silhouette, filled with the number of its class."""

from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from datasets_prep.idx import open_idx
from datasets_prep.image_dataset import Split
from datasets_prep.label_maps.segmented_dataset import MapClasses, SegmentedDataset

__all__ = ["open_silhouettes", "silhouette"]

DARKEST = 20  # gray values above this belong to the garment
LARGEST_HOLE = 8  # in pixels; buttons and black patterns are at most this large, openings of handles and sandals larger
IN_PLANE = ndimage.generate_binary_structure(2, 1)  # a pixel's four neighbors
NEIGHBORS = np.stack([np.zeros_like(IN_PLANE), IN_PLANE, np.zeros_like(IN_PLANE)])  # no neighbors in other images


def open_silhouettes(name: str, datadir: Path, split: Split, image_size: int) -> SegmentedDataset:
    """Open Fashion-MNIST with label maps of 11 classes: background and the ten garments. See `open_idx`.

    Raises:
        UsageError: see `open_idx`.
    """
    images = open_idx(name, datadir, split, image_size)

    # Training reads each map many times, so it is computed once.
    maps = np.zeros((len(images), image_size, image_size), np.uint8)
    computed = np.zeros(len(images), bool)

    def read_map(index: int) -> torch.Tensor:
        if not computed[index]:
            garment = int(images.stored_labels[index]) + 1
            maps[index] = silhouette(images[index])[0].numpy() * np.uint8(garment)
            computed[index] = True
        return torch.from_numpy(maps[index].copy())

    classes = MapClasses(("background", *images.facts.class_names))
    return SegmentedDataset(
        images.facts, split, images.stored_labels, images.__getitem__, images.fingerprint, classes, read_map
    )


def silhouette(images: torch.Tensor) -> torch.Tensor:
    """Find the garment's pixels, bool [..., H, W], in images uint8 [..., H, W].

    These are the pixels brighter than DARKEST, and enclosed groups of at most LARGEST_HOLE darker pixels.
    """
    bright = (images > DARKEST).cpu().numpy().reshape(-1, *images.shape[-2:])
    enclosed = ndimage.binary_fill_holes(bright, structure=NEIGHBORS) & ~bright
    holes, _ = ndimage.label(enclosed, structure=NEIGHBORS)
    filled = np.bincount(holes.ravel()) <= LARGEST_HOLE
    filled[0] = False  # label 0 is everything outside the holes
    return torch.from_numpy(bright | filled[holes]).reshape(images.shape).to(images.device)
