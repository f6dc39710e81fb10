"""Attention through one function that picks the fastest correct kernel for the device and sequence length."""

import torch
from torch.nn import functional

__all__ = ["attention"]

# In bfloat16 on a CPU (that is, with AMX) plain matrix products were seen to beat torch's fused kernel in training, for short
# sequences; in float32 the fused one is faster (benchmarks/attention.py).
LONGEST_PLAIN = 256


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v [B, heads, L, d] (Vaswani et al. 2017, eq. 1)."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[-2] <= LONGEST_PLAIN:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return scores.softmax(dim=-1) @ value
    return functional.scaled_dot_product_attention(query, key, value)
