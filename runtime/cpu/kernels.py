"""Faster variants of torch layers for compiled networks, and of attention in bfloat16 on CPUs.

`with_cpu_kernels` swaps them into a network in place. Each variant is a subclass of the torch layer with the same
parameters, so state dicts, optimizers and parallel wrappers are unaffected. It differs from the torch layer only while
torch.compile traces it. Eager calls use torch's kernels, with bit-identical results and derivatives of any order.
Attention is the exception: it also chooses its kernel in eager calls.

The variants of the linear layer, GELU, embedding and attention apply on CPUs only. The compiled group norm and upsampling
apply on every device. benchmarks/layers.py and benchmarks/attention.py measure the gain.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import nn
from torch.nn import functional

__all__ = ["attention", "plain_attention", "with_cpu_kernels"]

BOUND, DEGREE = 4.1, 8  # input range and degree of the polynomials for GELU and its derivative
# The longest sequences, in tokens, for which plain attention is faster: with gradients, and without.
LONGEST_TRAINED, LONGEST_SAMPLED = 256, 16


def with_cpu_kernels(network: nn.Module) -> nn.Module:
    """Swap the faster variants into `network` in place, and return it.

    Layers are found by type. A subclass that overrides `forward` is left unchanged, unless it sets
    `same_values_as_torch = True`. Attention is replaced where a module has `functional.scaled_dot_product_attention` as an
    attribute. The call may be repeated, before or after the network is copied, wrapped for several processes or sharded.
    """
    for module in network.modules():
        layer: Any = type(module)
        for plain, form in FORMS.items():
            if _computes_as(layer, plain) and not issubclass(layer, form) and form.replaces(module):
                module.__class__ = _subclass(form, layer)
        for name, value in list(vars(module).items()):
            if value is functional.scaled_dot_product_attention:
                setattr(module, name, attention)
    return network


def _computes_as(layer: Any, plain: Any) -> bool:
    """Whether `layer` is `plain`, or a subclass that inherits its forward pass or sets `same_values_as_torch`."""
    return issubclass(layer, plain) and (
        layer.forward is plain.forward or getattr(layer, "same_values_as_torch", False)
    )


@cache
def _subclass(form: Any, layer: Any) -> Any:
    """The variant of `layer`, which may subclass a torch layer; its eager forward pass remains `layer`'s."""
    return form if layer in FORMS else type(layer.__name__, (form, layer), {})


def _compiled_for_a_cpu(tensor: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() and tensor.device.type == "cpu"


class CompiledLinear(nn.Linear):
    """Linear layer for tokens.

    The bias is added in the loop after the product, whereas torch first copies it to each row of the output. The bias
    gradient is summed over each sample's tokens, then over samples, in loops that stay in the cache.
    """

    @staticmethod
    def replaces(layer: Any) -> bool:
        """Whether this variant computes the same function as `layer`."""
        return layer.bias is not None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, L, D] to [B, L, D']."""
        if not _compiled_for_a_cpu(input) or input.ndim < 3:
            return super().forward(input)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        return _BiasOutside.apply(input.to(dtype), self.weight.to(dtype), self.bias)


class _BiasOutside(torch.autograd.Function):
    """Matrix product plus bias, rounded as under autocast, with an unrounded bias gradient."""

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


class CompiledGelu(nn.GELU):
    """GELU in the tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415), x S(x) with

        S(x) = (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.

    In bfloat16, polynomials replace S and the derivative of x S(x). Values are then within 1e-4 of the formula, and slopes
    within 6e-4. For comparison, bfloat16 rounds numbers near 1 by up to 2e-3.
    """

    @staticmethod
    def replaces(layer: Any) -> bool:
        """Whether this variant computes the same function as `layer`."""
        return layer.approximate == "tanh"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply GELU elementwise."""
        if _compiled_for_a_cpu(input) and input.dtype == torch.bfloat16:
            return _PolynomialGelu.apply(input)
        return super().forward(input)


def _share(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _derivative(x: np.ndarray) -> np.ndarray:
    share = _share(x)
    return share + 2 * math.sqrt(2 / math.pi) * x * share * (1 - share) * (1 + 3 * 0.044715 * x**2)


def _fit(function: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """Fit p, such that 1/2 + x p(2 x^2 / BOUND^2 - 1) approximates function(x) for |x| <= BOUND and is 1 at BOUND.

    Returns:
        The coefficients of p, lowest degree first.
    """

    def odd_part(w: np.ndarray) -> np.ndarray:
        x = BOUND * np.sqrt((w + 1) / 2)
        return (function(x) - 0.5) / x

    p = Chebyshev.interpolate(odd_part, DEGREE)
    scale = 0.5 / BOUND / float(p(1))
    return [scale * coefficient for coefficient in p.convert(kind=Polynomial).coef.tolist()]


SHARE, DERIVATIVE = _fit(_share), _fit(_derivative)


def _evaluate(coefficients: list[float], x: torch.Tensor) -> torch.Tensor:
    """Evaluate a fitted function; up to rounding, it is 0 below -BOUND and 1 above BOUND."""
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
        return (slopes[0].float() * _evaluate(DERIVATIVE, _prefetch(x.float()))).to(x.dtype)


def _prefetch(x: torch.Tensor) -> torch.Tensor:
    """Return x unchanged, but load each row into the cache before the polynomial reads it.

    By the backward pass, saved activations have left the caches. The short loop that finds a row's maximum waits less for
    memory than the polynomial would. This saves 4 to 6 % of a DiT's training step. A row that contains a NaN becomes all NaN.
    """
    return x.minimum(x.amax(-1, keepdim=True))


class CompiledEmbedding(nn.Embedding):
    """Embedding lookup with deterministic gradients.

    In the gradient of a compiled lookup, threads add to the same rows concurrently, so the order and the last bits change
    from run to run. A product with one-hot rows is exact in float32 and has a fixed order.
    """

    @staticmethod
    def replaces(layer: Any) -> bool:
        """Whether this variant computes the same function as `layer`."""
        return layer.padding_idx is None and layer.max_norm is None and not layer.scale_grad_by_freq

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up rows [..., D] by index [...]."""
        if not _compiled_for_a_cpu(self.weight):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return functional.one_hot(input, self.num_embeddings).to(self.weight.dtype) @ self.weight


class CompiledGroupNorm(nn.GroupNorm):
    """Group norm (Wu & He 2018, arXiv:1803.08494), computed in float32 and returned in the input's dtype.

    The compiler turns torch's group norm into loops that transpose channels-last tensors in the backward pass.
    """

    @staticmethod
    def replaces(layer: Any) -> bool:
        """Whether this variant computes the same function as `layer`."""
        return layer.affine

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize [B, C, L] or [B, C, H, W] over the channels of each group and all positions."""
        if not torch.compiler.is_compiling():
            return super().forward(input)
        wide, positions = input.float(), tuple(range(2, input.ndim))
        mean = self._average(wide.mean(positions, keepdim=True))
        centered = wide - mean.detach()  # the variance's derivative with respect to the mean is zero
        variance = self._average(centered.square().mean(positions, keepdim=True))
        affine = (-1, *[1] * len(positions))  # [C, 1, ...]
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(affine)
        return (wide * scale + (self.bias.view(affine) - mean * scale)).to(input.dtype)

    def _average(self, values: torch.Tensor) -> torch.Tensor:
        """Average values [B, C, 1, ...] over each channel's group.

        Every channel computes its own copy. The compiler stores a reduction's result as a [B, C] table. With a [B, groups]
        table, it would look up each channel's group at each position, one value at a time.
        """
        each = self.num_channels // self.num_groups
        grouped = values.view(-1, self.num_groups, 1, each).expand(-1, -1, each, -1)
        return grouped.mean(-1).view_as(values)


class CompiledUpsample(nn.Upsample):
    """Nearest-neighbor upsampling by a factor of 2.

    The compiler scatters the gradients of torch's interpolation one at a time.
    """

    @staticmethod
    def replaces(layer: Any) -> bool:
        """Whether this variant computes the same function as `layer`."""
        return layer.mode == "nearest" and layer.scale_factor == 2

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Upsample [B, C, H, W] to [B, C, 2 H, 2 W]."""
        if not torch.compiler.is_compiling():
            return super().forward(input)
        last = input.permute(0, 2, 3, 1)  # so that the result is channels-last
        batch, height, width, channels = last.shape
        twice = last[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).reshape(batch, 2 * height, 2 * width, channels)
        return twice.permute(0, 3, 1, 2)


FORMS: dict[type[nn.Module], Any] = {
    nn.Linear: CompiledLinear,
    nn.GELU: CompiledGelu,
    nn.Embedding: CompiledEmbedding,
    nn.GroupNorm: CompiledGroupNorm,
    nn.Upsample: CompiledUpsample,
}


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v [B, heads, L, d] (Vaswani et al. 2017, eq. 1), eager or compiled.

    In bfloat16 on a CPU, plain matrix products beat torch's fused kernel on short sequences. In float32 the fused kernel
    is faster.
    """
    short = query.shape[-2] <= (LONGEST_TRAINED if torch.is_grad_enabled() else LONGEST_SAMPLED)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and short:
        return plain_attention(query, key, value)
    return functional.scaled_dot_product_attention(query, key, value)


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute `attention` with matrix products and a softmax."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1) @ value
