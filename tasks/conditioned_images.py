"""Samples for given images: each is made under the dense condition of one image of a set, and its label."""

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
    """Images and their dense conditions; sample i is made for image i mod N, with number i mod N of its random parts."""

    images: ImageDataset
    condition: ConditionSource

    def places(self, indices: Sequence[int]) -> torch.Tensor:
        """The images [B] that samples `indices` are made for."""
        return torch.tensor([index % len(self.images) for index in indices])

    def originals(self, places: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, C, H, W] without padding."""
        return crop_padding(torch.stack([self.images[place] for place in places.tolist()]), self.images.facts)

    def raw(self, places: torch.Tensor) -> torch.Tensor:
        """The conditions uint8 [B, ., H, W] of images, before they are encoded."""
        return self.condition.read(places, torch.zeros(len(places), dtype=torch.bool), places.tolist())

    def shown(self, places: torch.Tensor) -> torch.Tensor:
        """Pictures of the conditions, uint8 [B, C, H, W], without padding."""
        return crop_padding(self.condition.show(self.raw(places)), self.images.facts)

    def labels(self) -> Labels:
        """The images' labels, for `generate`."""
        return lambda indices, num_classes: self.images.labels[self.places(indices)]

    def dense(self, sampler: Sampler) -> Dense:
        """The conditions as a sampler's network sees them, for `generate`."""
        return partial(self._encode, sampler)

    def _encode(self, sampler: Sampler, indices: Sequence[int]) -> torch.Tensor:
        places = self.places(indices)
        noise = sampler.other_noise(places.tolist(), "condition")
        return self.condition.encode(self.raw(places), noise)
