"""Transformer layers: self-attention and its variants, MLPs, norms and patch embedding.

RMSNorm          x / sqrt(mean x^2 + eps) * g                      Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4
SwiGLU           W3 (silu(W1 x) * (W2 x))                          Shazeer 2020, arXiv:2002.05202, eq. 6
QK-norm          norm(q) . norm(k) in each head                    Dehghani et al. 2023, arXiv:2302.05442, section 2
value residual   v_l <- m v_1 + (1 - m) v_l, with a learned m      Zhou et al. 2024, arXiv:2410.17897, section 3
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from models.rope import Rotation, rotate
from options import UsageError

__all__ = ["MLPS", "NORMS", "QK_NORMS", "Mlp", "PatchEmbed", "RmsNorm", "SelfAttention", "SwiGlu"]

MakeLayer = Callable[[int], nn.Module]


class RmsNorm(nn.Module):
    """RMSNorm over the last dimension, computed in at least float32.

    Args:
        width: size of the last dimension.
        affine: learn a scale g [width]; otherwise g = 1.
        eps: added to the mean square.
    """

    def __init__(self, width: int, *, affine: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x [..., width]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = None if self.weight is None else self.weight.to(wide.dtype)
        return functional.rms_norm(wide, wide.shape[-1:], weight, self.eps)


# Norms of tokens, and of the queries and keys beside them, as in LightningDiT (Yao et al. 2025, arXiv:2501.01423).
NORMS: Mapping[str, MakeLayer] = {
    "layer": partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False),
    "rms": partial(RmsNorm, affine=False),
    "rms_affine": RmsNorm,
}
QK_NORMS: Mapping[str, MakeLayer] = {"layer": nn.LayerNorm, "rms": RmsNorm, "rms_affine": RmsNorm}


class SelfAttention(nn.Module):
    """Multi-head self-attention on tokens [B, L, D].

    Args:
        hidden_size: D.
        num_heads: number of heads, which must divide D.
        qk_norm: makes the norms of queries and keys, given a head's width; None: no norms.
        mixes_values: mix the first block's values into this layer's, by a learned share that starts at 1/2.

    Raises:
        UsageError: the heads do not divide D.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, qk_norm: MakeLayer | None = None, *, mixes_values: bool = False
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise UsageError(f"a width of {hidden_size} cannot be divided among {num_heads} attention heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = (qk_norm(hidden_size // num_heads) if qk_norm else None for _ in range(2))
        self.value_mix = nn.Parameter(torch.full((1,), 0.5)) if mixes_values else None
        self.attention = functional.scaled_dot_product_attention  # runtime.cpu.kernels may replace this attribute
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, tokens: torch.Tensor, rotation: Rotation | None = None, first_values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply self-attention to tokens [B, L, D].

        Args:
            tokens: the tokens.
            rotation: rotates queries and keys by their positions.
            first_values: the first block's values [B, heads, L, D / heads], for layers that mix values.

        Returns:
            The new tokens, and this layer's own values [B, heads, L, D / heads].
        """
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        own = value
        if self.value_mix is not None and first_values is not None:
            value = (value + self.value_mix * (first_values - value)).to(value.dtype)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = self.attention(query.to(value.dtype), key.to(value.dtype), value)  # [B, heads, L, D / heads]
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width)), own


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


class SwiGlu(nn.Module):
    """Gated MLP with a hidden width of 8/3 x `width`, rounded down, so that it has as many parameters as `Mlp`.

    `w12` holds W1, then W2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., D] to [..., D], each token independently."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)


MLPS: Mapping[str, MakeLayer] = {"gelu": Mlp, "swiglu": SwiGlu}


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
