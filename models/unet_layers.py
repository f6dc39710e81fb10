"""Layers shared by the U-Nets: group norm and upsampling by 2.

On GPUs, autocast computes norms and interpolation in float32. These layers return the input's dtype on every device.
"""

import torch
from torch import nn

__all__ = ["Double", "GroupNorm"]


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu & He 2018, arXiv:1803.08494), computed in float32 and returned in the input's dtype."""

    same_values_as_torch = True  # so that runtime.cpu.kernels may replace the layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize [B, C, L] or [B, C, H, W] over each group's channels and all positions."""
        return super().forward(input).to(input.dtype)


class Double(nn.Upsample):
    """Nearest-neighbor upsampling of x [B, C, H, W] to [B, C, 2 H, 2 W]."""

    same_values_as_torch = True

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="nearest")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Repeat each value of [B, C, H, W] in a 2 x 2 square."""
        return super().forward(input).to(input.dtype)
