"""Alignment of latents to a frozen image encoder's features (VA-VAE, Yao et al. 2025, arXiv:2501.01423, section 3).

For the latents z_i and the features f_i at the N positions of an image, and a learned matrix P,

    cosine:    mean_i max(0, 1 - m1 - cos(P z_i, f_i)),
    distance:  mean_ij max(0, |cos(z_i, z_j) - cos(f_i, f_j)| - m2).

The first aligns each latent with its feature, the second the similarities within an image. The margins leave latents free once
they are similar enough. The sum is multiplied by --align_weight and the adaptive weight.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from options import option
from runtime.randomness import seed_for

__all__ = ["AlignmentOptions", "LatentAlignment", "cosine_loss", "distance_loss", "new_alignment"]


@dataclass(frozen=True)
class AlignmentOptions:
    """Alignment of latents."""

    align_weight: float = option(
        0.0,
        "weight of the alignment of latents to --align_encoder's features, times the adaptive weight (usually 0.1); 0: none",
        minimum=0,
    )
    align_cosine_margin: float = option(
        0.5,
        "m1: a latent whose projection has a cosine above 1 - m1 with its feature is not aligned further",
        minimum=0,
    )
    align_distance_margin: float = option(
        0.25, "m2: similarities of two latents and of their features may differ by this much", minimum=0
    )


class LatentAlignment(nn.Module):
    """The alignment loss with its learned projection P, which belongs to the training and not to the autoencoder.

    Args:
        channels: of the latents, c.
        width: of the features, d.
        options: margins.
    """

    def __init__(self, channels: int, width: int, options: AlignmentOptions) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, 1, bias=False)
        self._margins = options.align_cosine_margin, options.align_distance_margin

    def forward(self, z: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The loss, 0-d float32 even under autocast, of latents [B, c, h, w] and features [B, d, h, w]."""
        with torch.autocast(z.device.type, enabled=False):
            z, features = z.float(), features.float()
            cosine_margin, distance_margin = self._margins
            cosine = cosine_loss(self.projection(z), features, cosine_margin)
            return cosine + distance_loss(z, features, distance_margin)


def new_alignment(channels: int, width: int, options: AlignmentOptions, seed: int) -> LatentAlignment:
    """An alignment whose initial projection depends only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "alignment"))
        return LatentAlignment(channels, width, options)


def cosine_loss(projected: torch.Tensor, features: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean of max(0, 1 - margin - cosine) over images and positions, for two maps [B, d, h, w]."""
    return functional.relu(1 - margin - functional.cosine_similarity(projected, features, dim=1)).mean()


def distance_loss(z: torch.Tensor, features: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean of max(0, |difference of cosines| - margin) over images and pairs of positions, for maps [B, c or d, h, w]."""
    ours, theirs = (_similarities(each) for each in (z, features))
    return functional.relu((ours - theirs).abs() - margin).mean()


def _similarities(vectors: torch.Tensor) -> torch.Tensor:
    """Cosines [B, N, N] between the vectors of a map [B, d, h, w] at its N = h w positions."""
    unit = functional.normalize(vectors.flatten(2), dim=1)
    return unit.mT @ unit
