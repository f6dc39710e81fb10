"""Attention through one function that picks the fastest correct kernel for the device and sequence length."""

import torch
from torch import nn
from torch.nn import functional

from models.transformer_layers import Linear

__all__ = ["SelfAttention", "attention", "plain_attention"]

# In bfloat16 on a CPU plain matrix products beat torch's fused kernel up to so many tokens, with and without gradients; in
# float32 the fused one is faster (benchmarks/attention.py).
LONGEST_TRAINED, LONGEST_SAMPLED = 256, 16


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v [B, heads, L, d] (Vaswani et al. 2017, eq. 1)."""
    short = query.shape[-2] <= (LONGEST_TRAINED if torch.is_grad_enabled() else LONGEST_SAMPLED)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and short:
        return plain_attention(query, key, value)
    return functional.scaled_dot_product_attention(query, key, value)


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same by matrix products and a softmax."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1) @ value


class SelfAttention(nn.Module):
    """Multi-head self-attention on tokens [B, L, D]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Attend among the tokens."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = attention(*qkv.unbind(0))  # [B, heads, L, D / heads]
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
