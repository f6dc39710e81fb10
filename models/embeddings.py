"""Embeddings of times and labels, and sinusoidal features of numbers.

A number v is represented by cosines and sines of decreasing frequencies (Vaswani et al. 2017, section 3.5):

    cos(v f_i), sin(v f_i),      f_i = 10000^(-i / n),      i = 0, ..., n - 1.
"""

import math

import torch
from torch import nn

__all__ = ["LabelEmbedding", "TimeEmbedding", "batch_times", "sinusoids"]

LONGEST_PERIOD = 10000.0


def batch_times(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Expand t ([B] or 0-d) to times [B] for a batch x [B, ...], in x's dtype but at least float32."""
    return t.expand(x.shape[0]).to(torch.promote_types(x.dtype, torch.float32))


def sinusoids(values: torch.Tensor, count: int, *, sines_first: bool = False, endpoint: bool = False) -> torch.Tensor:
    """Sinusoidal features [N, 2 count] of values [N]: all cosines, then all sines, in the values' dtype.

    Args:
        values: floating-point numbers.
        count: number of frequencies n.
        sines_first: put all sines before all cosines.
        endpoint: use f_i = 10000^(-i / (n - 1)), whose last frequency is 1 / 10000.
    """
    exponents = torch.arange(count, device=values.device, dtype=values.dtype) / (count - 1 if endpoint else count)
    angles = values[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
    waves = (angles.sin(), angles.cos()) if sines_first else (angles.cos(), angles.sin())
    return torch.cat(waves, dim=1)


class TimeEmbedding(nn.Module):
    """Embedding [B, D] of times t [B]: sinusoids, then two linear layers.

    Args:
        count: number of frequencies.
        width: D.
        sines_first: put sines before cosines.
    """

    def __init__(self, count: int, width: int, *, sines_first: bool = False) -> None:
        super().__init__()
        self.count, self.sines_first = count, sines_first
        self.mlp = nn.Sequential(nn.Linear(2 * count, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embed t [B]."""
        return self.mlp(sinusoids(t, self.count, sines_first=self.sines_first))


class LabelEmbedding(nn.Module):
    """Table with one row per class, and one more for the null class if labels are dropped in training."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: torch.Tensor | None) -> torch.Tensor:
        """Rows [B, D] for labels [B]; for None, the last row [D]."""
        return self.embedding_table.weight[-1] if labels is None else self.embedding_table(labels)
