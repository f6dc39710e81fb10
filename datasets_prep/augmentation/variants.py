"""Variants of a dataset's images, and a source of training data that draws images and variants.

Each image has K variants. They form a separate dataset, which is encoded and cached like other images. The source
numbers the N images and their variants together: variant k of image i has the index N + K i + k.
"""

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np
import torch

from datasets_prep.augmentation.transforms import augment, draw_parameters
from datasets_prep.image_dataset import ImageDataset
from datasets_prep.moments import MomentSource
from runtime.randomness import generator_for

__all__ = ["AugmentedMoments", "VariantRecipe", "WithVariants", "variants_of"]

FORMAT = "variants-1"  # changes with the numbers in transforms.py


@dataclass(frozen=True)
class VariantRecipe:
    """How variants are made.

    Args:
        kinds: kinds of augmentation, keys of AUGMENTATIONS in their order.
        copies: K, variants of each image.
        mirrored: whether mirror images belong to the data, although the network does not see which images are mirrored. Every
            other variant is then made from the mirror image.
    """

    kinds: tuple[str, ...]
    copies: int
    mirrored: bool

    @property
    def name(self) -> str:
        """A name for folders that changes with the recipe."""
        recipe = json.dumps([FORMAT, self.kinds, self.copies, self.mirrored])
        return f"augmented_{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"

    def parameters(self, images: int) -> torch.Tensor:
        """The parameters [N K, P] of the variants of N images."""
        return draw_parameters(self.kinds, images, self.copies)


def variants_of(dataset: ImageDataset, recipe: VariantRecipe) -> ImageDataset:
    """The variants of all images: variant k of image i has the index K i + k."""
    parameters = recipe.parameters(len(dataset))

    def read(index: int) -> torch.Tensor:
        image, copy = divmod(index, recipe.copies)
        pixels = dataset[image]
        pixels = pixels.flip(2) if recipe.mirrored and (image + copy) % 2 else pixels
        return augment(pixels, recipe.kinds, parameters[index])

    fingerprint = hashlib.sha256(f"{dataset.fingerprint} {recipe.name}".encode()).hexdigest()
    labels = np.repeat(dataset.stored_labels, recipe.copies)
    return ImageDataset(replace(dataset.facts, flips=False), dataset.split, labels, read, fingerprint)


class WithVariants:
    """Moments, or an encoder's features, of N images and of their K variants each. The length is N.

    Args:
        images: of the images.
        variants: of the variants, in the order of `variants_of`.
        copies: K.
    """

    def __init__(self, images: MomentSource, variants: MomentSource, copies: int) -> None:
        self.labels = torch.cat([images.labels, images.labels.repeat_interleave(copies)])
        self._images, self._variants = images, variants

    def __len__(self) -> int:
        return len(self._images)

    def moments(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """Moments [B, ...] of images and variants `indices` [B]; images are mirrored where `mirrored` [B], variants are not."""
        is_variant = indices >= len(self)
        rows = torch.cat([(~is_variant).nonzero()[:, 0], is_variant.nonzero()[:, 0]])
        count = int(is_variant.sum())
        images, variants = rows.split([len(rows) - count, count])
        read = []
        if len(images):
            read.append(self._images.moments(indices[images], mirrored[images]))
        if len(variants):
            read.append(self._variants.moments(indices[variants] - len(self), torch.zeros(count, dtype=torch.bool)))
        found = torch.cat(read)
        return found[rows.argsort().to(found.device)]


class AugmentedMoments(WithVariants):
    """A source of training data that replaces some images by their variants.

    Args:
        images, variants: as for `WithVariants`.
        recipe: how the variants were made.
        probability: of a variant in place of an image.
    """

    def __init__(self, images: MomentSource, variants: MomentSource, recipe: VariantRecipe, probability: float) -> None:
        super().__init__(images, variants, recipe.copies)
        self._copies, self._probability = recipe.copies, probability
        changed = recipe.parameters(len(images))
        self._parameters = torch.cat([changed.new_zeros(len(images), changed.shape[1]), changed])

    def choose_variants(self, chosen: torch.Tensor, seed: int, step: int) -> torch.Tensor:
        """Replace some of the images `chosen` in a step's global batch by one of their variants, from an own random stream."""
        generator = generator_for(seed, "augment", step)
        replaced = torch.rand(len(chosen), generator=generator) < self._probability
        copies = torch.randint(self._copies, chosen.shape, generator=generator)
        return torch.where(replaced, len(self) + self._copies * chosen + copies, chosen)

    def parameters(self, indices: torch.Tensor) -> torch.Tensor:
        """The parameters [B, P] of images and variants `indices` [B]; zeros for images."""
        return self._parameters[indices]
