"""Embeddings of times and labels, and sinusoidal features of numbers.

A number v is represented by cosines and sines of decreasing frequencies (Vaswani et al. 2017, section 3.5):

    cos(v f_i), sin(v f_i),      f_i = 10000^(-i / n),      i = 0, ..., n - 1.

These frequencies suit numbers in [0, 1000]. A time t in [0, 1] can be multiplied by a factor first, or represented by Fourier
features (Tancik et al. 2020, arXiv:2006.10739, section 5), whose frequencies are drawn once:

    sin(2 pi t w_i), cos(2 pi t w_i),      w_i ~ N(0, 1).
"""

import math

import torch
from torch import nn

__all__ = [
    "TIME_EMBEDDINGS",
    "ContextTokens",
    "LabelEmbedding",
    "TimeEmbedding",
    "TimeFeatures",
    "batch_times",
    "sinusoids",
]

TIME_EMBEDDINGS = ("sinusoids", "fourier")
LONGEST_PERIOD = 10000.0
SEED = 0  # of the frequencies of Fourier features, which no other seed changes


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


class TimeFeatures(nn.Module):
    """Features [B, 2 count] of times t [B]: sinusoids, or Fourier features with fixed frequencies `W` in the state dict.

    Args:
        count: number of frequencies.
        kind: one of TIME_EMBEDDINGS.
        factor: multiplies the times first.
        sines_first: put sines before cosines; Fourier features always do.
        endpoint: the sinusoids' last frequency is 1 / 10000.
    """

    def __init__(
        self,
        count: int,
        kind: str = "sinusoids",
        factor: float = 1.0,
        *,
        sines_first: bool = False,
        endpoint: bool = False,
    ) -> None:
        super().__init__()
        self.count, self.factor, self.sines_first, self.endpoint = count, factor, sines_first, endpoint
        self.W = nn.Parameter(_gaussian_frequencies(count), requires_grad=False) if kind == "fourier" else None

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Features [B, 2 count] of t [B]."""
        if self.factor != 1:
            t = self.factor * t
        if self.W is None:
            return sinusoids(t, self.count, sines_first=self.sines_first, endpoint=self.endpoint)
        angles = 2 * math.pi * t[:, None] * self.W
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(TimeFeatures):
    """Embedding [B, D] of times t [B]: features, then two linear layers.

    Args:
        count: number of frequencies.
        width: D.
        kind: one of TIME_EMBEDDINGS.
        factor: multiplies the times first.
        sines_first: put sines before cosines.
    """

    def __init__(
        self, count: int, width: int, kind: str = "sinusoids", factor: float = 1.0, *, sines_first: bool = False
    ) -> None:
        super().__init__(count, kind, factor, sines_first=sines_first)
        self.mlp = nn.Sequential(nn.Linear(2 * count, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embed t [B]."""
        return self.mlp(super().forward(t))


def _gaussian_frequencies(count: int) -> torch.Tensor:
    """`count` samples of N(0, 1), the same in every network."""
    samples = torch.randn(count, generator=torch.Generator("cpu").manual_seed(SEED), device="cpu")
    return samples.to(torch.get_default_device())


class LabelEmbedding(nn.Module):
    """Table with one row per class, and one more for the null class if labels are dropped in training."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: torch.Tensor | None) -> torch.Tensor:
        """Rows [B, D] for labels [B]; for None, the last row [D]."""
        return self.embedding_table.weight[-1] if labels is None else self.embedding_table(labels)


class ContextTokens(nn.Module):
    """Tokens [B, N, D] that hold the class and the time (Li & He 2025, arXiv:2511.13720; iMF, arXiv:2512.02012).

    A label has `class_tokens` tokens of its own; the time embedding repeats in `time_tokens` tokens. Each token adds a learned
    position.

    Args:
        label_rows: rows of the label table, as in LabelEmbedding.
        class_tokens: number of tokens of the class.
        time_tokens: number of tokens of the time.
        width: D.
    """

    def __init__(self, label_rows: int, class_tokens: int, time_tokens: int, width: int) -> None:
        super().__init__()
        self.class_tokens, self.time_tokens, self.width = class_tokens, time_tokens, width
        self.y_embedder = LabelEmbedding(label_rows, class_tokens * width) if class_tokens else None
        self.positions = nn.Parameter(torch.zeros(class_tokens + time_tokens, width))

    def forward(self, time: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Tokens for the time embedding [B, D] and labels [B]; None is the last label."""
        tokens = time[:, None].expand(-1, self.time_tokens, -1)
        if self.y_embedder is not None:
            classes = self.y_embedder(labels).view(-1, self.class_tokens, self.width)
            tokens = torch.cat([classes.expand(len(time), -1, -1).to(tokens.dtype), tokens], dim=1)
        return tokens + self.positions
