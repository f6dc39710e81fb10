"""Layers of transformers.

Compiled for a CPU, a linear layer and, in bfloat16, GELU are other formulas for torch's values, of which the compiler makes
faster loops (benchmarks/layers.py). Elsewhere they call torch's own kernels.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import nn
from torch.nn import functional

from models.compilation import compiled_for_a_cpu

__all__ = ["Gelu", "Linear", "Mlp", "PatchEmbed"]

BOUND, DEGREE = 4.1, 8  # of the polynomials for GELU and its derivative


class Linear(nn.Linear):
    """A linear layer with a bias.

    Compiled for a CPU, the loop that comes after the product adds the bias, where torch's product first copies it to each row
    of its output; and its gradient is summed over a sample's tokens, then over samples, in loops that stay in the cache.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map [N, D] to [N, D'], or [B, L, D] to [B, L, D']."""
        if not compiled_for_a_cpu(input):
            return super().forward(input)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        return _BiasOutside.apply(input.to(dtype), self.weight.to(dtype), self.bias)


class _BiasOutside(torch.autograd.Function):
    """A product and a bias, rounded as autocast does, and a bias's gradient that is not rounded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        return functional.linear(x, weight) + bias.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        (slope,) = slopes
        rows, sums = slope.flatten(0, -2), slope.to(ctx.bias_dtype)
        while sums.ndim > 1:
            sums = sums.sum(-2)
        return (rows @ weight).view(x.shape), rows.t() @ x.flatten(0, -2), sums


class Gelu(nn.Module):
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415), x S(x) with

        S(x) = (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.

    Compiled for a CPU in bfloat16, S and the derivative of x S(x) are made of polynomials. Values are then within 1e-4 of the
    formula's, slopes within 6e-4; bfloat16 rounds numbers near 1 by up to 2e-3.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each value of x by itself."""
        if compiled_for_a_cpu(x) and x.dtype == torch.bfloat16:
            return _PolynomialGelu.apply(x)
        return functional.gelu(x, approximate="tanh")


def _share(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _derivative(x: np.ndarray) -> np.ndarray:
    share = _share(x)
    return share + 2 * math.sqrt(2 / math.pi) * x * share * (1 - share) * (1 + 3 * 0.044715 * x**2)


def _fit(function: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """Coefficients of p, rising, with function(x) close to 1/2 + x p(2 x^2 / BOUND^2 - 1) up to BOUND, and 1 at BOUND."""

    def odd_part(w: np.ndarray) -> np.ndarray:
        x = BOUND * np.sqrt((w + 1) / 2)
        return (function(x) - 0.5) / x

    p = Chebyshev.interpolate(odd_part, DEGREE)
    scale = 0.5 / BOUND / float(p(1))
    return [scale * coefficient for coefficient in p.convert(kind=Polynomial).coef.tolist()]


SHARE, DERIVATIVE = _fit(_share), _fit(_derivative)


def _evaluate(coefficients: list[float], x: torch.Tensor) -> torch.Tensor:
    """What was fitted, within BOUND; below it 0, above it 1, to a rounding."""
    x = x.clamp(-BOUND, BOUND)
    w = x * x * (2 / BOUND**2) - 1
    total = coefficients[-1] * w + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = total * w + coefficient
    return 0.5 + x * total


class _PolynomialGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        wide = x.float()
        return (wide * _evaluate(SHARE, wide)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return (slopes[0].float() * _evaluate(DERIVATIVE, _fetched(x.float()))).to(x.dtype)


def _fetched(x: torch.Tensor) -> torch.Tensor:
    """The same x, each row fetched before the long formula reads it.

    What was saved has left the caches, and the short loop that looks for a row's largest value waits less for memory: 4 to 6 %
    of a DiT's training step. Where a row has a NaN, all of it becomes NaN.
    """
    return x.minimum(x.amax(-1, keepdim=True))


class Mlp(nn.Module):
    """Two linear layers around GELU, four times as wide between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.act = Gelu()
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map each [..., D] by itself."""
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(nn.Module):
    """Tokens of patches: a convolution by its weights and their names, computed as a linear map of each patch's values.

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
        """Tokens [B, L, D] of x [B, C, h, w], row by row of patches."""
        patches = functional.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2)  # [B, L, C p p]
        # Contiguous, or the order of torch's sums would depend on whether weights need gradients.
        return functional.linear(patches.contiguous(), self.proj.weight.flatten(1), self.proj.bias)
