"""Layers that the U-Nets share.

Run eagerly, they call torch's own kernels. Compiled, a norm and a doubling are other formulas for the same values: of torch's,
the compiler makes loops that turn tensors which lie channels last around in the backward pass of a norm, and scatter the
gradients of an interpolation one by one (benchmarks/layers.py).
"""

import torch
from torch import nn
from torch.nn import functional

__all__ = ["GroupNorm", "double", "halve"]


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu & He 2018, arXiv:1803.08494), of the input's precision and computed in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [B, C, L] or [B, C, H, W] among the channels of each group and all positions."""
        if not torch.compiler.is_compiling():
            return super().forward(x).to(x.dtype)
        wide, positions = x.float(), tuple(range(2, x.ndim))
        mean = self._average(wide.mean(positions, keepdim=True))
        centred = wide - mean.detach()  # the variance's derivative by the mean is zero
        variance = self._average(centred.square().mean(positions, keepdim=True))
        affine = (-1, *[1] * len(positions))  # [C, 1, ...]
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(affine)
        return (wide * scale + (self.bias.view(affine) - mean * scale)).to(x.dtype)

    def _average(self, values: torch.Tensor) -> torch.Tensor:
        """The average of each channel's group, for values [B, C, 1, ...].

        Every channel computes it anew. The compiler stores what a reduction gives as a table [B, C]; from a table [B, groups]
        it would look the group of each channel up at each position, one value at a time.
        """
        each = self.num_channels // self.num_groups
        grouped = values.view(-1, self.num_groups, 1, each).expand(-1, -1, each, -1)
        return grouped.mean(-1).view_as(values)


def halve(x: torch.Tensor) -> torch.Tensor:
    """Averages [B, C, H / 2, W / 2] of squares of 2 x 2 of x [B, C, H, W]."""
    return functional.avg_pool2d(x, 2)


def double(x: torch.Tensor) -> torch.Tensor:
    """The nearest neighbours [B, C, 2 H, 2 W] of x [B, C, H, W]."""
    if not torch.compiler.is_compiling():
        return functional.interpolate(x, scale_factor=2, mode="nearest").to(x.dtype)
    last = x.permute(0, 2, 3, 1)  # so that the result lies channels last
    batch, height, width, channels = last.shape
    twice = last[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).reshape(batch, 2 * height, 2 * width, channels)
    return twice.permute(0, 3, 1, 2)
