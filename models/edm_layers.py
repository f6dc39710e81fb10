"""Layers of EDM's U-Nets (Karras et al. 2022, arXiv:2206.00364, appendix F): convolution, group norm, residual block."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models.unet_layers import Double, GroupNorm
from options import UsageError

__all__ = ["SQRT_HALF", "STYLES", "Block", "Convolution", "Norm", "Style"]

CHANNELS_PER_HEAD = 64


class Style(NamedTuple):
    """The differences between adm, ddpm++ and ncsn++."""

    adaptive_scale: bool  # the embedding scales and shifts (adm); otherwise, it only shifts
    eps: float
    skip_scale: float
    filter: tuple[int, ...]
    always_project: bool  # resampling skips have a 1x1 convolution even if the channels match
    heads: Callable[[int], int]
    pyramid: bool  # ncsn++: a downsampled input is added at every level of the encoder
    init: str


SQRT_HALF = math.sqrt(0.5)
STYLES = {
    "adm": Style(True, 1e-5, 1.0, (1, 1), False, lambda channels: channels // CHANNELS_PER_HEAD, False, "kaiming"),
    "ddpm++": Style(False, 1e-6, SQRT_HALF, (1, 1), True, lambda channels: 1, False, "xavier"),
    "ncsn++": Style(False, 1e-6, SQRT_HALF, (1, 3, 3, 1), True, lambda channels: 1, True, "xavier"),
}


class Convolution(nn.Module):
    """Convolution with optional resampling by a fixed filter before it; with kernel 0, it only resamples.

    With `fused`, downsampling comes after the convolution instead, as in the residual pyramid of ncsn++.
    """

    resample_filter: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        filter: tuple[int, ...] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.outputs, self.up, self.down, self.fused = outputs, up, down, fused
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(outputs)) if kernel else None
        taps = torch.tensor(filter, dtype=torch.float32)
        table = torch.outer(taps, taps)[None, None] / taps.sum().square()
        self.register_buffer("resample_filter", table if up or down else None)
        self.filter_padding = (len(filter) - 1) // 2
        # Equivalent to resampling with the filter (1, 1). The buffer remains, because LFM's checkpoints contain it.
        self.box: nn.Module | None = None
        if (up or down) and filter == (1, 1):
            self.box = Double() if up else nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Resample and convolve x [B, C, H, W]."""
        if self.weight is None or self.bias is None:
            return self._resample(x, self.filter_padding) if self.up or self.down else x
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        padding = weight.shape[-1] // 2
        if self.fused:
            x = functional.conv2d(x, weight, padding=padding + self.filter_padding)
            return self._resample(x, padding=0) + bias[:, None, None]
        if self.up or self.down:
            x = self._resample(x, self.filter_padding)
        return functional.conv2d(x, weight, bias, padding=padding)

    def _resample(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        if self.box is not None:
            return self.box(x)
        channels = x.shape[1]
        filters = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.up:
            return functional.conv_transpose2d(x, 4 * filters, stride=2, padding=padding, groups=channels)
        return functional.conv2d(x, filters, stride=2, padding=padding, groups=channels)


class Norm(GroupNorm):
    """Group norm with min(32, C // 4) groups.

    Raises:
        UsageError: the number of channels is not a multiple of the number of groups.
    """

    def __init__(self, channels: int, eps: float) -> None:
        groups = min(32, channels // 4)
        if not groups or channels % groups:
            raise UsageError(
                f"group norm cannot divide a layer of {channels} channels into {groups} groups: choose an --nf that is a "
                "multiple of 32, or another --ch_mult"
            )
        super().__init__(groups, channels, eps)


class Block(nn.Module):
    """Residual block that takes an embedding, with optional resampling and self-attention."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        style: Style,
        dropout: float,
        *,
        up: bool = False,
        down: bool = False,
        attend: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.style = inputs, outputs, style
        self.heads = style.heads(outputs) if attend else 0
        if self.heads and outputs % self.heads:
            raise UsageError(
                f"{outputs} channels cannot be divided among {self.heads} attention heads: "
                "choose another --nf or --ch_mult"
            )
        self.dropout = nn.Dropout(dropout)
        resample: dict[str, Any] = {"up": up, "down": down, "filter": style.filter}
        self.norm0 = Norm(inputs, style.eps)
        self.conv0 = Convolution(inputs, outputs, 3, **resample)
        self.affine = nn.Linear(embedding, outputs * (2 if style.adaptive_scale else 1))
        self.norm1 = Norm(outputs, style.eps)
        self.conv1 = Convolution(outputs, outputs, 3)
        self.skip: Convolution | None = None
        if outputs != inputs or up or down:
            kernel = 1 if style.always_project or outputs != inputs else 0
            self.skip = Convolution(inputs, outputs, kernel, **resample)
        if self.heads:
            self.norm2 = Norm(outputs, style.eps)
            self.qkv = Convolution(outputs, 3 * outputs, 1)
            self.attention = functional.scaled_dot_product_attention
            self.proj = Convolution(outputs, outputs, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Transform x [B, C, H, W], given the embedding [B, E]."""
        h = self.conv0(functional.silu(self.norm0(x)))
        affine = self.affine(embedding)[:, :, None, None]
        if self.style.adaptive_scale:
            scale, shift = affine.chunk(2, dim=1)
            h = functional.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = functional.silu(self.norm1(h + affine))
        h = self.conv1(self.dropout(h))
        x = (h + (x if self.skip is None else self.skip(x))) * self.style.skip_scale
        if self.heads:
            x = (x + self.proj(self._attend(x))) * self.style.skip_scale
        return x

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).view(batch, self.heads, channels // self.heads, 3, height * width)
        query, key, value = qkv.permute(3, 0, 1, 4, 2)  # each [B, heads, L, head width]
        return self.attention(query, key, value).transpose(2, 3).reshape(batch, channels, height, width)
