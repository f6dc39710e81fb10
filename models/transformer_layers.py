"""Transformer layers: self-attention, MLP and patch embedding."""

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Mlp", "PatchEmbed", "SelfAttention"]


class SelfAttention(nn.Module):
    """Multi-head self-attention on tokens [B, L, D]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention = functional.scaled_dot_product_attention  # runtime.cpu.kernels may replace this attribute
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply self-attention to tokens [B, L, D]."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = self.attention(*qkv.unbind(0))  # [B, heads, L, D / heads]
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """Two linear layers with GELU between them, and a hidden width of 4 x `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., D] to [..., D], each token independently."""
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(nn.Module):
    """Patch embedding with a convolution's weights and names, computed as a linear map of each patch's values.

    Args:
        patch_size: side of a patch.
        channels: C of the input.
        width: D of the tokens.
    """

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L, D] of x [B, C, h, w], with patches in row-major order."""
        patches = functional.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2)  # [B, L, C p p]
        # Contiguous, so that the order of torch's sums does not depend on whether the weights require gradients.
        return functional.linear(patches.contiguous(), self.proj.weight.flatten(1), self.proj.bias)
