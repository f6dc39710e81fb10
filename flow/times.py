"""Distributions of training times in [0, 1], as deterministic functions of the caller's uniform random numbers.

A shift by s maps every time to t' = s t / (1 + (s - 1) t), which keeps 0 and 1 (Esser et al. 2024, arXiv:2403.03206, section
5.3.2). It multiplies the noise-to-data ratio t / (1 - t) by s. Latents of d numbers hide less under the same noise if d is
larger, so s = sqrt(d / 4096) keeps the difficulty of a time as in latents of 4096 numbers (Zheng et al. 2025, arXiv:2510.11690,
"RAE"), on training times and on the sampler's grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from options import option

__all__ = [
    "AUTO_SHIFT",
    "TIME_SAMPLINGS",
    "TimeOptions",
    "dimension_shift",
    "logit_normal",
    "shift_times",
    "training_times",
    "with_time_shift",
]

T = TypeVar("T", bound="TimeOptions")

AUTO_SHIFT = {"auto": 0.0}  # stands for `dimension_shift`
U_SHAPE = 4.0  # a in `_u_shaped`
UNSHIFTED_DIMENSIONS = 4096  # of the latents of 256-pixel images by Stable Diffusion's autoencoder


def _uniform(uniform: torch.Tensor, options: "TimeOptions") -> torch.Tensor:
    return uniform


def _logit_normal(uniform: torch.Tensor, options: "TimeOptions") -> torch.Tensor:
    return logit_normal(uniform, options.time_location, options.time_scale)


def _stratified(uniform: torch.Tensor, options: "TimeOptions") -> torch.Tensor:
    """Times (u + i / B) mod 1 with one random offset u per batch; they cover [0, 1] evenly (Kingma et al. 2021, appendix I).

    The reversed times 1 - t are also stratified, with offset 1 - u.
    """
    offsets = torch.arange(len(uniform), device=uniform.device, dtype=torch.float64) / len(uniform)
    return ((uniform[0].double() + offsets) % 1).float()


def _u_shaped(uniform: torch.Tensor, options: "TimeOptions") -> torch.Tensor:
    """Times with density proportional to cosh(a (t - 1/2)), a = 4 (Lee et al. 2024, arXiv:2405.20320)."""
    normalized = (2 * uniform.double() - 1) * math.sinh(U_SHAPE / 2)
    return (0.5 + normalized.asinh() / U_SHAPE).clamp(0, 1).float()


TIME_SAMPLINGS: dict[str, Callable[[torch.Tensor, "TimeOptions"], torch.Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "stratified": _stratified,
    "u_shaped": _u_shaped,
}


@dataclass(frozen=True)
class TimeOptions:
    """Training times."""

    time_sampling: str = option("uniform", "distribution of training times", choices=TIME_SAMPLINGS)
    time_location: float = option(0.0, "location of logit_normal times; values above 0 mean more noise")
    time_scale: float = option(1.0, "scale of logit_normal times", minimum=0)
    training_time_shift: float = option(
        1.0,
        "s in the shifted training times t' = s t / (1 + (s - 1) t); auto (or 0): sqrt(d / 4096) for latents of d numbers, "
        "at least 1",
        minimum=0,
        maximum=1e6,
        words=AUTO_SHIFT,
    )


def logit_normal(uniform: torch.Tensor, location: float, scale: float) -> torch.Tensor:
    """sigmoid(location + scale z) for standard normal z (Esser et al. 2024, arXiv:2403.03206, eq. 19)."""
    normal = torch.special.ndtri(uniform.double().clamp(1e-7, 1 - 1e-7))
    return torch.sigmoid(location + scale * normal).float()


def training_times(uniform: torch.Tensor, options: TimeOptions) -> torch.Tensor:
    """Times [N] from uniform numbers [N] in [0, 1), one per sample of the global batch."""
    t = TIME_SAMPLINGS[options.time_sampling](uniform, options)
    return t if options.training_time_shift == 1 else shift_times(t, options.training_time_shift)


def shift_times(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Times s t / (1 + (s - 1) t) for the shift s."""
    return shift * t / (1 - t + shift * t)


def dimension_shift(dimensions: int) -> float:
    """The shift sqrt(d / 4096) for latents of d numbers, and 1 for fewer than 4096.

    The formula was derived and tested for larger latents. For smaller ones it would move nearly all times close to data: 0.25
    for the bundled latents of 256 numbers. Such a shift can be given as a number.
    """
    return max(1.0, math.sqrt(dimensions / UNSHIFTED_DIMENSIONS))


def with_time_shift(options: T, dimensions: int) -> T:
    """The options with the shift for latents of `dimensions` numbers, if it is `auto`."""
    shift = options.training_time_shift or dimension_shift(dimensions)
    return replace(options, training_time_shift=shift)
