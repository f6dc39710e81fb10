"""Dense conditions by image index: masked images or label maps (Dao et al. 2023, section 5.3).

A source works in two steps, so that a thread can read the next batch while the network runs. `read` returns
uint8 [B, ., H, W] on the CPU. `encode` turns that into a map [B, K, h, w] of the latents' size, on their device. `read` uses
numpy, because torch's parallel loops in this thread would slow down the network's (see training/data.py).
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
MaskDraw = Callable[[int], torch.Tensor]  # maps a draw's number to a mask, bool [H, W], True in the hole


class ConditionSource(Protocol):
    """Dense conditions of a dataset's images; `dense` describes the network's input."""

    dense: DenseInput

    def read(self, indices: torch.Tensor, mirrored: torch.Tensor, draws: Sequence[int]) -> torch.Tensor:
        """Read the conditions of images `indices` [B] as uint8 [B, ., H, W].

        Conditions are mirrored where `mirrored` [B]. `draws` [B] number the random draws, such as the masks.
        """
        ...

    def encode(self, raw: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Encode the output of `read` to a map [B, K, h, w] on the device of `noise`, standard normal [B, c, h, w]."""
        ...

    def show(self, raw: torch.Tensor) -> torch.Tensor:
        """Turn the output of `read` into pictures, uint8 [B, C, H, W]."""
        ...


class MaskedImages:
    """Latents of images with black holes, and the masks: [latent (c), 2 m - 1 (1)], where m = 1 in the hole.

    Args:
        dataset: the images.
        autoencoder: encodes them; the latent is a posterior sample.
        masks: `masks(draws[i])` is the mask of image i. Masks have the size of the image without its padding; the padding is
            never masked.
        machine: sets the precision of encoding.
    """

    def __init__(self, dataset: ImageDataset, autoencoder: Autoencoder, masks: MaskDraw, machine: Machine) -> None:
        self.dense = DenseInput(autoencoder.latent_channels + 1)
        self._dataset = dataset
        self._autoencoder = autoencoder
        self._masks = masks
        self._machine = machine
        self._border = (dataset.facts.image_size - shown_side(dataset.facts)) // 2

    def read(self, indices: torch.Tensor, mirrored: torch.Tensor, draws: Sequence[int]) -> torch.Tensor:
        """Read masked images and, as the last channel, masks in {0, 1}: uint8 [B, C + 1, H, W]. Masks are not mirrored."""
        rows = []
        for index, flip, draw in zip(indices.tolist(), mirrored.tolist(), draws, strict=True):
            image, hole = self._dataset[index].numpy(), np.pad(self._masks(draw).numpy(), self._border)
            image = image[..., ::-1] if flip else image
            rows.append(np.concatenate([np.where(hole, np.uint8(0), image), hole[None].astype(np.uint8)]))
        return torch.from_numpy(np.stack(rows))

    def encode(self, raw: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Encode to [latent, mask], float32 [B, c + 1, h, w]. The mask is resized by nearest neighbor."""
        raw = raw.to(noise.device, non_blocking=True)
        with self._machine.autocast():
            moments = self._autoencoder.encode(raw[:, :-1])
        latents = self._autoencoder.sample(moments, noise)
        holes = functional.interpolate(raw[:, -1:].float(), latents.shape[2:], mode="nearest")
        return torch.cat([latents, 2 * holes - 1], dim=1)

    def show(self, raw: torch.Tensor) -> torch.Tensor:
        """The masked images with gray holes, uint8 [B, C, H, W]."""
        return torch.where(raw[:, -1:] > 0, GREY, raw[:, :-1])


class LabelMaps:
    """Label maps, encoded as each class's share of a latent pixel's image region. The network maps the shares to c channels.

    Args:
        dataset: images with label maps.
        autoencoder: determines the factor f and the channels c.
    """

    def __init__(self, dataset: SegmentedDataset, autoencoder: Autoencoder) -> None:
        self.dense = DenseInput(autoencoder.latent_channels, dataset.classes.count)
        self._dataset = dataset
        self._factor = autoencoder.factor

    def read(self, indices: torch.Tensor, mirrored: torch.Tensor, draws: Sequence[int]) -> torch.Tensor:
        """Read label maps uint8 [B, 1, H, W]. Mirrored maps exchange left and right classes. `draws` has no effect."""
        rows = []
        for index, flip in zip(indices.tolist(), mirrored.tolist(), strict=True):
            label_map = self._dataset.label_map(index)
            rows.append((mirror_map(label_map, self._dataset.classes) if flip else label_map).numpy())
        return torch.from_numpy(np.stack(rows)[:, None])

    def encode(self, raw: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Encode to class shares in [0, 1], float32 [B, K, h, w]."""
        return class_shares(raw.to(noise.device, non_blocking=True)[:, 0], self._dataset.classes.count, self._factor)

    def show(self, raw: torch.Tensor) -> torch.Tensor:
        """The maps in their classes' colors, uint8 [B, 3, H, W]."""
        return colour_map(raw[:, 0], self._dataset.classes)


def class_shares(maps: torch.Tensor, classes: int, factor: int) -> torch.Tensor:
    """Compute the share of each class in squares of `factor` x `factor` pixels.

    The result equals the one-hot map after log2(factor) bilinear halvings, as in LFM's published code. The one-hot map is
    never held at full size.

    Args:
        maps: class ids [B, H, W]. Ids from K on are unlabeled and count toward no class.
        classes: K.
        factor: side of the squares.

    Returns:
        float32 [B, K, h, w].
    """
    squares = functional.pixel_unshuffle(maps[:, None].long().clamp(max=classes), factor)  # [B, factor^2, h, w]
    counts = torch.zeros(len(maps), classes + 1, *squares.shape[2:], device=maps.device)
    counts.scatter_add_(1, squares, torch.ones_like(squares, dtype=counts.dtype))
    return counts[:, :classes] / factor**2
