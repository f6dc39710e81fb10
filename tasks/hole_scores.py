"""Holes of masked images: pasting known pixels back into samples, and PSNR inside the holes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from evaluation.metrics import psnr

__all__ = ["HoleErrors", "mean_colour", "paste_known"]


def paste_known(samples: torch.Tensor, originals: torch.Tensor, holes: torch.Tensor, feather: int = 0) -> torch.Tensor:
    """Replace the pixels of samples outside the holes by the originals'.

    Args:
        samples: uint8 [B, C, H, W].
        originals: uint8 [B, C, H, W].
        holes: bool [B, 1, H, W], True inside.
        feather: width in pixels of the seam outside the hole, over which the sample fades out linearly.

    Returns:
        Images uint8 [B, C, H, W]. All pixels beyond the seam are exactly the original's.
    """
    weight = reached = holes.float()
    for distance in range(1, feather + 1):
        reached = functional.max_pool2d(reached, 3, stride=1, padding=1)
        weight = torch.maximum(weight, reached * (1 - distance / (feather + 1)))
    return (weight * samples + (1 - weight) * originals).round().to(torch.uint8)


def mean_colour(images: torch.Tensor, holes: torch.Tensor) -> torch.Tensor:
    """The mean [B, C, 1, 1] of the known pixels of images [B, C, H, W] with holes, bool [B, 1, H, W]."""
    known = (~holes).double()
    return (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)


class HoleErrors:
    """PSNR over all pixels inside holes, of the samples and, for comparison, of the known pixels' mean colour.

    Args:
        holes: gives the holes, bool [B, 1, H, W], of the images with numbers [B].
    """

    def __init__(self, holes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._holes = holes
        self._totals = torch.zeros(3, dtype=torch.float64)  # squared errors of both, values

    def update(self, samples: torch.Tensor, originals: torch.Tensor, places: torch.Tensor) -> None:
        """See `PairScore`."""
        holes, images = self._holes(places), originals.double()
        guesses = samples.double(), mean_colour(images, holes)
        errors = [((guess - images).square() * holes).sum() for guess in guesses]
        self._totals += torch.stack([*errors, holes.sum() * images.shape[1]])

    def totals(self) -> torch.Tensor:
        """See `PairScore`."""
        return self._totals

    def result(self, totals: torch.Tensor) -> dict[str, Any]:
        """`psnr_hole` and `psnr_hole_mean_colour` in dB; empty if no image has a hole."""
        samples, mean, values = totals.tolist()
        if not values:
            return {}
        return {
            "psnr_hole": psnr(samples / values, value_range=255),
            "psnr_hole_mean_colour": psnr(mean / values, value_range=255),
        }
