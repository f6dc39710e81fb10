"""Images that provide the dense conditions and labels for sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from datasets_prep.conditions import ConditionSource
from datasets_prep.datasets import ImageDataset, crop_padding
from sampling.sampler import Dense, Labels, Sampler

__all__ = ["ConditionedImages"]


@dataclass(frozen=True)
class ConditionedImages:
    """N images with their dense conditions.

    Sample i uses the condition and the label of image i mod N. This index also numbers the sample's random draws.
    """

    images: ImageDataset
    condition: ConditionSource

    def image_indices(self, indices: Sequence[int]) -> torch.Tensor:
        """The image indices [B] of the samples `indices`."""
        return torch.tensor([index % len(self.images) for index in indices])

    def originals(self, image_indices: torch.Tensor) -> torch.Tensor:
        """The images `image_indices` [B], uint8 [B, C, H, W], without padding."""
        return crop_padding(torch.stack([self.images[index] for index in image_indices.tolist()]), self.images.facts)

    def raw(self, image_indices: torch.Tensor) -> torch.Tensor:
        """The images' conditions before encoding, uint8 [B, ., H, W]."""
        mirrored = torch.zeros(len(image_indices), dtype=torch.bool)
        return self.condition.read(image_indices, mirrored, image_indices.tolist())

    def shown(self, image_indices: torch.Tensor) -> torch.Tensor:
        """Pictures of the images' conditions, uint8 [B, C, H, W], without padding."""
        return crop_padding(self.condition.show(self.raw(image_indices)), self.images.facts)

    def labels(self) -> Labels:
        """The images' labels, for `generate`."""
        return lambda indices, num_classes: self.images.labels[self.image_indices(indices)]

    def dense(self, sampler: Sampler) -> Dense:
        """The encoded conditions on a sampler's device, for `generate`."""
        return partial(self._encode, sampler)

    def _encode(self, sampler: Sampler, indices: Sequence[int]) -> torch.Tensor:
        image_indices = self.image_indices(indices)
        noise = sampler.other_noise(image_indices.tolist(), "condition")
        return self.condition.encode(self.raw(image_indices), noise)
