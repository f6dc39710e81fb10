"""The interface of datasets with label maps, and operations on maps: mirroring and coloring."""

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

    Args:
        names: class names, in the order of the ids.
        mirrored: pairs of ids, left and right, that a mirror image exchanges.
        background: whether class 0 is the background, which is drawn black.
        scored: whether pixels of class 0 count in scores.
    """

    names: tuple[str, ...]
    mirrored: tuple[tuple[int, int], ...] = ()
    background: bool = True
    scored: bool = True

    @property
    def count(self) -> int:
        """The number of classes K."""
        return len(self.names)

    @property
    def palette(self) -> np.ndarray:
        """One color per class, uint8 [K, 3]. Colors are distinct, and only the background is black."""
        return distinct_colours(self.count) if self.background else distinct_colours(self.count + 1)[1:]


class SegmentedDataset(ImageDataset):
    """An ImageDataset with a label map for each image.

    `fingerprint` covers the images alone, because latents do not depend on the maps. `maps_fingerprint` covers the map files;
    it is empty if the maps are computed from the images.
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
        """Read the class ids uint8 [H, W] of the image `self[index]`, with the same crop.

        Ids 0 to K - 1 are classes. Larger ids (NO_CLASS) mark pixels of no class, whose one-hot vector is zero.
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
        """The images with the indices `kept`, int64 [n], and their maps."""
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
    """Flip maps uint8 [..., H, W] on the CPU and exchange their left and right classes, for mirror images."""
    ids = np.arange(IDS, dtype=np.uint8)
    for left, right in classes.mirrored:
        ids[left], ids[right] = right, left
    return torch.from_numpy(ids[maps.numpy()[..., ::-1]])


def colour_map(maps: torch.Tensor, classes: MapClasses) -> torch.Tensor:
    """Color maps uint8 [B, H, W] to pictures uint8 [B, 3, H, W]. Pixels of no class are black."""
    colours = torch.zeros(IDS, 3, dtype=torch.uint8, device=maps.device)
    colours[: classes.count] = torch.from_numpy(classes.palette).to(maps.device)
    return colours[maps.long()].permute(0, 3, 1, 2).contiguous()


def distinct_colours(count: int) -> np.ndarray:
    """Create distinct colors uint8 [count, 3], for `count` up to 256. The first is black.

    The colors are the PASCAL VOC devkit's. The bits of a color's number, lowest first, become bits of red, green and blue in
    turn, highest first.
    """
    colors = np.zeros((count, 3), np.uint8)
    numbers = np.arange(count)
    for bit in range(8):
        channel, channel_bit = bit % 3, 7 - bit // 3
        colors[:, channel] |= ((numbers >> bit & 1) << channel_bit).astype(np.uint8)
    return colors
