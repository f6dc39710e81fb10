"""Dense conditions by image index: images behind masks, or label maps (Dao et al. 2023, section 5.3).

A source works in two steps, so that a thread can read the files of the next batch while the network works: `read` gives
uint8 [B, ., H, W] on the CPU, `encode` turns that into a map [B, K, h, w] as large as the latents, on their device. The
thread works with numpy, since torch's parallel loops in it would slow the network's own (see training/data.py).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from datasets_prep.image_dataset import ImageDataset, shown_side
from datasets_prep.label_maps.segmented_dataset import SegmentedDataset, colour_map, mirror_map
from models.autoencoders.protocol import Autoencoder
from models.conditions import DenseInput
from runtime.precision import Machine

__all__ = ["ConditionSource", "LabelMaps", "MaskDraw", "MaskedImages", "class_shares"]

GREY = torch.tensor(128, dtype=torch.uint8)
MaskDraw = Callable[[int], torch.Tensor]  # a number to a mask, bool [H, W], True where the image is to be filled in


class ConditionSource(Protocol):
    """Dense conditions of a dataset's images; `dense` says what the network sees."""

    dense: DenseInput

    def read(self, indices: torch.Tensor, mirrored: torch.Tensor, draws: Sequence[int]) -> torch.Tensor:
        """uint8 [B, ., H, W] of images `indices` [B], mirrored where `mirrored` [B]; `draws` number random parts."""
        ...

    def encode(self, raw: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The map [B, K, h, w] of what `read` gave, moved to the device of `noise`, standard normal [B, c, h, w]."""
        ...

    def show(self, raw: torch.Tensor) -> torch.Tensor:
        """A picture of it, uint8 [B, C, H, W]."""
        ...


class MaskedImages:
    """Latents of images whose holes are black, and the masks: [latent (c), 2 m - 1 (1)] with m = 1 in the hole.

    Args:
        dataset: the images.
        autoencoder: encodes them; the latent is a posterior sample.
        masks: number `draws[i]` is that of image i, as large as the image without its padding, which is never hidden.
        machine: its precision is that of encoding.
    """

    def __init__(self, dataset: ImageDataset, autoencoder: Autoencoder, masks: MaskDraw, machine: Machine) -> None:
        self.dense = DenseInput(autoencoder.latent_channels + 1)
        self._dataset = dataset
        self._autoencoder = autoencoder
        self._masks = masks
        self._machine = machine
        self._border = (dataset.facts.image_size - shown_side(dataset.facts)) // 2

    def read(self, indices: torch.Tensor, mirrored: torch.Tensor, draws: Sequence[int]) -> torch.Tensor:
        """Masked images and, as the last channel, the masks in {0, 1}: uint8 [B, C + 1, H, W]; masks are not mirrored."""
        rows = []
        for index, flip, draw in zip(indices.tolist(), mirrored.tolist(), draws, strict=True):
            image, hole = self._dataset[index].numpy(), np.pad(self._masks(draw).numpy(), self._border)
            image = image[..., ::-1] if flip else image
            rows.append(np.concatenate([np.where(hole, np.uint8(0), image), hole[None].astype(np.uint8)]))
        return torch.from_numpy(np.stack(rows))

    def encode(self, raw: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """[latent, mask], float32 [B, c + 1, h, w]; the mask is resized by nearest neighbour."""
        raw = raw.to(noise.device, non_blocking=True)
        with self._machine.autocast():
            moments = self._autoencoder.encode(raw[:, :-1])
        latents = self._autoencoder.sample(moments, noise)
        holes = functional.interpolate(raw[:, -1:].float(), latents.shape[2:], mode="nearest")
        return torch.cat([latents, 2 * holes - 1], dim=1)

    def show(self, raw: torch.Tensor) -> torch.Tensor:
        """The masked images with grey holes, uint8 [B, C, H, W]."""
        return torch.where(raw[:, -1:] > 0, GREY, raw[:, :-1])


class LabelMaps:
    """The share of each class in the image's region behind a latent pixel, which the network maps to c channels.

    Args:
        dataset: images with label maps.
        autoencoder: its factor f and channels c.
    """

    def __init__(self, dataset: SegmentedDataset, autoencoder: Autoencoder) -> None:
        self.dense = DenseInput(autoencoder.latent_channels, dataset.classes.count)
        self._dataset = dataset
        self._factor = autoencoder.factor

    def read(self, indices: torch.Tensor, mirrored: torch.Tensor, draws: Sequence[int]) -> torch.Tensor:
        """Label maps uint8 [B, 1, H, W]; in a mirrored one left and right are classes exchanged. Nothing is random."""
        rows = []
        for index, flip in zip(indices.tolist(), mirrored.tolist(), strict=True):
            label_map = self._dataset.label_map(index)
            rows.append((mirror_map(label_map, self._dataset.classes) if flip else label_map).numpy())
        return torch.from_numpy(np.stack(rows)[:, None])

    def encode(self, raw: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Shares in [0, 1], float32 [B, K, h, w]."""
        return class_shares(raw.to(noise.device, non_blocking=True)[:, 0], self._dataset.classes.count, self._factor)

    def show(self, raw: torch.Tensor) -> torch.Tensor:
        """The maps in their classes' colours, uint8 [B, 3, H, W]."""
        return colour_map(raw[:, 0], self._dataset.classes)


def class_shares(maps: torch.Tensor, classes: int, factor: int) -> torch.Tensor:
    """One-hot maps [B, K, H, W] of class ids [B, H, W], averaged over squares of `factor` pixels: float32 [B, K, h, w].

    The same as halving the one-hot map log2(factor) times by bilinear interpolation, as published, without ever holding it
    at full size. Ids from K on are unlabelled and count as no class.
    """
    squares = functional.pixel_unshuffle(maps[:, None].long().clamp(max=classes), factor)  # [B, factor^2, h, w]
    counts = torch.zeros(len(maps), classes + 1, *squares.shape[2:], device=maps.device)
    counts.scatter_add_(1, squares, torch.ones_like(squares, dtype=counts.dtype))
    return counts[:, :classes] / factor**2
