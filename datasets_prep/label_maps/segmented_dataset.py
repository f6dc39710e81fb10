"""The contract of the datasets for semantic synthesis: images with label maps, and what maps need: flips and colours."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from datasets_prep.image_dataset import DatasetFacts, ImageDataset, Split
from datasets_prep.images import NO_CLASS

__all__ = ["NO_CLASS", "MapClasses", "SegmentedDataset", "colour_map", "distinct_colours", "mirror_map"]

IDS = 256


@dataclass(frozen=True)
class MapClasses:
    """The K classes of label maps.

    `names` are in the order of the ids; `mirrored` are the pairs of ids, left and right, that change places in a mirror
    image; `background` tells whether class 0 is everything else, which is drawn black; `scored` whether pixels of class 0
    count in scores.
    """

    names: tuple[str, ...]
    mirrored: tuple[tuple[int, int], ...] = ()
    background: bool = True
    scored: bool = True

    @property
    def count(self) -> int:
        """K."""
        return len(self.names)

    @property
    def palette(self) -> np.ndarray:
        """A colour uint8 [K, 3] for each class, no two alike; only the background is black."""
        return distinct_colours(self.count) if self.background else distinct_colours(self.count + 1)[1:]


class SegmentedDataset(ImageDataset):
    """An ImageDataset with a label map for each image.

    `fingerprint` is that of the images alone, as latents do not depend on the maps; `maps_fingerprint` is that of the files
    of the maps, empty where these are made of the images.
    """

    def __init__(
        self,
        facts: DatasetFacts,
        split: Split,
        labels: np.ndarray,
        read: Callable[[int], torch.Tensor],
        fingerprint: str,
        classes: MapClasses,
        read_map: Callable[[int], torch.Tensor],
        maps_fingerprint: str = "",
    ) -> None:
        super().__init__(facts, split, labels, read, fingerprint)
        self.classes = classes
        self.maps_fingerprint = maps_fingerprint
        self._read_map = read_map

    def label_map(self, index: int) -> torch.Tensor:
        """Class ids uint8 [H, W] of the pixels of `self[index]`, after the same crop.

        Ids 0 to K - 1 are classes; larger ones (NO_CLASS) mean a pixel of no class, whose one-hot vector is zero.
        """
        return self._read_map(index)

    def verify(self, index: int) -> None:
        """Read one image and its map.

        Raises:
            BadImageError: one of them is damaged.
        """
        super().verify(index)
        self.label_map(index)

    def subset(self, kept: np.ndarray) -> "SegmentedDataset":
        """The images `kept`, int64 [n] of indices, with their maps."""
        return self._with_images(super().subset(kept), lambda index: self.label_map(int(kept[index])))

    def head(self, count: int) -> "SegmentedDataset":
        """The first `count` images with their maps."""
        return self._with_images(super().head(count), self._read_map)

    def _with_images(self, images: ImageDataset, read_map: Callable[[int], torch.Tensor]) -> "SegmentedDataset":
        return SegmentedDataset(
            images.facts,
            images.split,
            images.stored_labels,
            images.__getitem__,
            images.fingerprint,
            self.classes,
            read_map,
            self.maps_fingerprint,
        )


def mirror_map(maps: torch.Tensor, classes: MapClasses) -> torch.Tensor:
    """The maps uint8 [..., H, W] of the mirror images, on the CPU: flipped, with left and right classes changing places."""
    ids = np.arange(IDS, dtype=np.uint8)
    for left, right in classes.mirrored:
        ids[left], ids[right] = right, left
    return torch.from_numpy(ids[maps.numpy()[..., ::-1]])


def colour_map(maps: torch.Tensor, classes: MapClasses) -> torch.Tensor:
    """Pictures uint8 [B, 3, H, W] of maps uint8 [B, H, W]; pixels of no class are black."""
    colours = torch.zeros(IDS, 3, dtype=torch.uint8, device=maps.device)
    colours[: classes.count] = torch.from_numpy(classes.palette).to(maps.device)
    return colours[maps.long()].permute(0, 3, 1, 2).contiguous()


def distinct_colours(count: int) -> np.ndarray:
    """Colours uint8 [count, 3], `count` up to 256, by the rule of PASCAL VOC's devkit; the first is black.

    The bits of a number, from the lowest, become in turn a bit of red, green and blue, from the highest.
    """
    colours = np.zeros((count, 3), np.uint8)
    numbers = np.arange(count)
    for bit in range(8):
        colour, place = bit % 3, 7 - bit // 3
        colours[:, colour] |= ((numbers >> bit & 1) << place).astype(np.uint8)
    return colours
