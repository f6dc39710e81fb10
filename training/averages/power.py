"""Power averages and their linear combinations (EDM2, Karras et al. 2024, arXiv 2312.02696, section 3).

After T updates, a power average with exponent gamma is the sum of w(k) theta_k over the updates k, where

    w(k) = (k^(gamma + 1) - (k - 1)^(gamma + 1)) / T^(gamma + 1),

which is the integral from k - 1 to k of the profile p(tau) = (gamma + 1) tau^gamma / T^(gamma + 1) on [0, T]. A linear
relation between profiles therefore holds for the averages too, for any weights theta_k. The relative width sigma_rel is the
standard deviation of tau / T under p.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from checkpoints.header import PowerAverage

__all__ = ["LARGEST_WIDTH", "SMALLEST_WIDTH", "Combination", "combine", "exponent_of", "width_of"]

SMALLEST_WIDTH, LARGEST_WIDTH = 0.005, 0.28  # exponents from 198 to 0.15; a uniform average has the width 0.2887


class Combination(NamedTuple):
    """A linear combination of power averages.

    Args:
        coefficients: of the averages, float64 [N], with the sum 1.
        error: norm of the difference between the combined profile and the wanted one, divided by the norm of the latter.
    """

    coefficients: torch.Tensor
    error: float


def width_of(exponent: float) -> float:
    """The relative width sigma_rel of a power average with this exponent (section 3 of the paper)."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def exponent_of(sigma_rel: float) -> float:
    """The exponent gamma of a power average with this relative width, at most LARGEST_WIDTH.

    It is the root of gamma^3 + 7 gamma^2 + (16 - sigma_rel^-2) gamma + 12 - sigma_rel^-2 above 0. The width decreases with the
    exponent there, so bisection finds it.
    """
    low, high = 0.0, 2 / sigma_rel
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if width_of(middle) > sigma_rel else (low, middle)
    return middle


def combine(averages: Sequence[PowerAverage], wanted: PowerAverage) -> Combination:
    """The linear combination of power averages whose profile is closest to the profile of `wanted` in the L2 norm.

    The coefficients solve the normal equations in float64; scaling them to the sum 1 preserves
    weights that are constant in training. The combination of averages that include `wanted` is `wanted`.
    """
    profiles = [*averages, wanted]
    gammas = torch.tensor([exponent_of(each.sigma_rel) for each in profiles], dtype=torch.float64)
    ends = torch.tensor([each.updates / wanted.updates for each in profiles], dtype=torch.float64)
    products = _log_products(gammas, ends)
    log_norms = products.diagonal() / 2
    cosines = (products - log_norms[:, None] - log_norms).exp()
    # gelsd finds the solution of least norm where two averages are equal, as after steps that were all skipped.
    solved = torch.linalg.lstsq(cosines[:-1, :-1], cosines[:-1, -1:], driver="gelsd").solution[:, 0]
    coefficients = solved * (log_norms[-1] - log_norms[:-1]).exp()
    scale = 1 / coefficients.sum()
    difference = torch.cat([solved * scale, -torch.ones(1, dtype=torch.float64)])
    squared = difference @ cosines @ difference
    return Combination(coefficients * scale, squared.clamp(min=0).sqrt().item())


def _log_products(gammas: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Logarithms of the inner products [N, N] of profiles with exponents [N] on [0, ends [N]]."""
    a, b = gammas[:, None], gammas
    least = torch.minimum(ends[:, None], ends)
    factor = ((a + 1) * (b + 1) / (a + b + 1)).log() + (a + b + 1) * least.log()
    return factor - (a + 1) * ends[:, None].log() - (b + 1) * ends.log()
