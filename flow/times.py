"""Distributions of training times in [0, 1], as functions of uniform numbers, so that the randomness stays outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from flow.paths import PathOptions

__all__ = ["TIME_SAMPLINGS", "training_times"]


def training_times(uniform: torch.Tensor, options: PathOptions) -> torch.Tensor:
    """Times [N] from uniform numbers [N] in [0, 1), one per sample of the global batch."""
    return TIME_SAMPLINGS[options.time_sampling](uniform, options)


def _uniform(uniform: torch.Tensor, options: PathOptions) -> torch.Tensor:
    return uniform


def _logit_normal(uniform: torch.Tensor, options: PathOptions) -> torch.Tensor:
    """sigmoid(location + scale z), z normal (Esser et al. 2024, arXiv:2403.03206, eq. 19)."""
    normal = torch.special.ndtri(uniform.double().clamp(1e-7, 1 - 1e-7))
    return torch.sigmoid(options.time_location + options.time_scale * normal).float()


def _stratified(uniform: torch.Tensor, options: PathOptions) -> torch.Tensor:
    """One random offset for the batch: (u + i / B) mod 1, which covers [0, 1] evenly (Kingma et al. 2021, appendix I).

    Times that run the other way, 1 - t, are stratified as well, with the offset 1 - u.
    """
    offsets = torch.arange(len(uniform), device=uniform.device, dtype=torch.float64) / len(uniform)
    return ((uniform[0].double() + offsets) % 1).float()


TIME_SAMPLINGS: dict[str, Callable[[torch.Tensor, PathOptions], torch.Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "stratified": _stratified,
}
