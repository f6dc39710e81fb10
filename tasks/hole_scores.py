"""Pasting of known pixels into inpainting samples, and PSNR inside the holes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from evaluation.metrics import psnr

__all__ = ["HoleErrors", "mean_colour", "paste_known"]


def paste_known(samples: torch.Tensor, originals: torch.Tensor, holes: torch.Tensor, feather: int = 0) -> torch.Tensor:
    """Replace the samples' pixels outside the holes with the originals' pixels.

    Args:
        samples: uint8 [B, C, H, W].
        originals: uint8 [B, C, H, W].
        holes: bool [B, 1, H, W], True inside.
        feather: width in pixels of the seam outside the hole, where the sample fades out linearly.

    Returns:
        Images uint8 [B, C, H, W]. All pixels beyond the seam equal the original's exactly.
    """
    weight = reached = holes.float()
    for distance in range(1, feather + 1):
        reached = functional.max_pool2d(reached, 3, stride=1, padding=1)
        weight = torch.maximum(weight, reached * (1 - distance / (feather + 1)))
    return (weight * samples + (1 - weight) * originals).round().to(torch.uint8)


def mean_colour(images: torch.Tensor, holes: torch.Tensor) -> torch.Tensor:
    """The mean color [B, C, 1, 1] of the known pixels in images [B, C, H, W] with holes, bool [B, 1, H, W]."""
    known = (~holes).double()
    return (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)


class HoleErrors:
    """PSNR over all pixels inside the holes, for the samples and, as a baseline, for the known pixels' mean color.

    Args:
        holes: maps image indices [B] to holes, bool [B, 1, H, W].
    """

    def __init__(self, holes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._holes = holes
        # Sums of squared errors for the samples and the mean color, and the number of values.
        self._totals = torch.zeros(3, dtype=torch.float64)

    def update(self, samples: torch.Tensor, originals: torch.Tensor, image_indices: torch.Tensor) -> None:
        """See `PairScore`."""
        holes, images = self._holes(image_indices), originals.double()
        guesses = samples.double(), mean_colour(images, holes)
        errors = [((guess - images).square() * holes).sum() for guess in guesses]
        self._totals += torch.stack([*errors, holes.sum() * images.shape[1]])

    def totals(self) -> torch.Tensor:
        """See `PairScore`."""
        return self._totals

    def result(self, totals: torch.Tensor) -> dict[str, Any]:
        """The entries `psnr_hole` and `psnr_hole_mean_colour` in dB; empty if no image has a hole."""
        samples, mean, values = totals.tolist()
        if not values:
            return {}
        return {
            "psnr_hole": psnr(samples / values, value_range=255),
            "psnr_hole_mean_colour": psnr(mean / values, value_range=255),
        }
