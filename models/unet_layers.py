"""Layers that the U-Nets share: group norm and doubling.

Autocast computes norms and interpolations in float32 on GPUs; these layers return the input's dtype on every device.
"""

import torch
from torch import nn

__all__ = ["Double", "GroupNorm"]


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu & He 2018, arXiv:1803.08494) in the input's dtype, computed in float32."""

    same_values_as_torch = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise [B, C, L] or [B, C, H, W] over the channels of each group and all positions."""
        return super().forward(input).to(input.dtype)


class Double(nn.Upsample):
    """Nearest neighbours [B, C, 2 H, 2 W] of x [B, C, H, W]."""

    same_values_as_torch = True

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="nearest")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Repeat each value of [B, C, H, W] in a square of 2 x 2."""
        return super().forward(input).to(input.dtype)
