"""Images to sample for: every sample gets the dense condition and the label of one image."""

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
    """N images and their dense conditions. Sample i belongs to image i mod N, and its random parts have the number i mod N."""

    images: ImageDataset
    condition: ConditionSource

    def places(self, indices: Sequence[int]) -> torch.Tensor:
        """Numbers [B] of the images that samples `indices` belong to."""
        return torch.tensor([index % len(self.images) for index in indices])

    def originals(self, places: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, C, H, W] with numbers `places` [B], without padding."""
        return crop_padding(torch.stack([self.images[place] for place in places.tolist()]), self.images.facts)

    def raw(self, places: torch.Tensor) -> torch.Tensor:
        """Conditions uint8 [B, ., H, W] of images, before they are encoded."""
        return self.condition.read(places, torch.zeros(len(places), dtype=torch.bool), places.tolist())

    def shown(self, places: torch.Tensor) -> torch.Tensor:
        """Pictures of the conditions, uint8 [B, C, H, W], without padding."""
        return crop_padding(self.condition.show(self.raw(places)), self.images.facts)

    def labels(self) -> Labels:
        """The images' labels, for `generate`."""
        return lambda indices, num_classes: self.images.labels[self.places(indices)]

    def dense(self, sampler: Sampler) -> Dense:
        """The encoded conditions on a sampler's device, for `generate`."""
        return partial(self._encode, sampler)

    def _encode(self, sampler: Sampler, indices: Sequence[int]) -> torch.Tensor:
        places = self.places(indices)
        noise = sampler.other_noise(places.tolist(), "condition")
        return self.condition.encode(self.raw(places), noise)
