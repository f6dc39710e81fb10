"""Reading the shards of a latent cache in any order, at the speed of the disk.

Memory-mapped files are read around the place that is touched: for a row of 16 kB in random order, that may be megabytes. So
the system is told that the order is random, and which rows a batch will take before the first is touched: then they come
from the disk at the same time, and nothing else does.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["LatentCache"]

ADVISABLE = hasattr(mmap, "MADV_WILLNEED")  # not on Windows


class LatentCache:
    """Moments of every image of a split, read by index without touching a pixel."""

    def __init__(self, folder: Path, manifest: dict[str, Any], labels: torch.Tensor) -> None:
        self.folder = folder
        self.labels = labels
        self.precision: str = manifest.get("precision", "fp32")  # of encoding; older ones lack it
        self.orientations: int = manifest["orientations"]
        self.shard_size: int = manifest["shard_size"]
        self.shards = [_map_rows(folder / entry["file"]) for entry in manifest["shards"]]
        self.moment_shape: tuple[int, ...] = tuple(manifest["moment_shape"])
        rows = [min(self.shard_size, len(labels) - first) for first in range(0, len(labels), self.shard_size)]
        expected = [(count, self.orientations, *self.moment_shape) for count in rows]
        if [shard.shape for shard in self.shards] != expected:
            raise ValueError("its shards have other shapes than it says")

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """float16 moments [B, 2 c, h, w] of images `indices` [B], of the mirror image where `mirrored` [B]."""
        moments = np.empty((len(indices), *self.moment_shape), np.float16)
        shard_of, row_of = np.divmod(indices.numpy(), self.shard_size)
        orientation_of = mirrored.numpy().astype(int) % self.orientations
        places = list(zip(shard_of.tolist(), row_of.tolist(), orientation_of.tolist(), strict=True))
        for shard, row, orientation in places:
            _announce(self.shards[shard], row * self.orientations + orientation, moments[:1].nbytes)
        for place, (shard, row, orientation) in enumerate(places):
            moments[place] = self.shards[shard][row, orientation]
        return torch.from_numpy(moments)


def _map_rows(path: Path) -> np.memmap:
    """The array of a file, of which rows are read in any order."""
    array: np.memmap = np.load(path, mmap_mode="r")
    if ADVISABLE:
        array.base.madvise(mmap.MADV_RANDOM)  # type: ignore[union-attr]
    return array


def _announce(array: np.memmap, number: int, size: int) -> None:
    """Have the system begin to read the `number`th `size` bytes of a file's array, without waiting for them."""
    if ADVISABLE:
        first = array.offset + number * size
        start = first - first % mmap.PAGESIZE
        array.base.madvise(mmap.MADV_WILLNEED, start, first + size - start)  # type: ignore[union-attr]
