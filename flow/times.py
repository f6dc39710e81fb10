"""Distributions of training times in [0, 1], as deterministic functions of the caller's uniform random numbers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from options import option

__all__ = ["TIME_SAMPLINGS", "TimeOptions", "training_times"]


def _uniform(uniform: torch.Tensor, options: "TimeOptions") -> torch.Tensor:
    return uniform


def _logit_normal(uniform: torch.Tensor, options: "TimeOptions") -> torch.Tensor:
    """sigmoid(location + scale z) for standard normal z (Esser et al. 2024, arXiv:2403.03206, eq. 19)."""
    normal = torch.special.ndtri(uniform.double().clamp(1e-7, 1 - 1e-7))
    return torch.sigmoid(options.time_location + options.time_scale * normal).float()


def _stratified(uniform: torch.Tensor, options: "TimeOptions") -> torch.Tensor:
    """Times (u + i / B) mod 1 with one random offset u per batch; they cover [0, 1] evenly (Kingma et al. 2021, appendix I).

    The reversed times 1 - t are also stratified, with offset 1 - u.
    """
    offsets = torch.arange(len(uniform), device=uniform.device, dtype=torch.float64) / len(uniform)
    return ((uniform[0].double() + offsets) % 1).float()


TIME_SAMPLINGS: dict[str, Callable[[torch.Tensor, "TimeOptions"], torch.Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "stratified": _stratified,
}


@dataclass(frozen=True)
class TimeOptions:
    """Training times."""

    time_sampling: str = option("uniform", "distribution of training times", choices=TIME_SAMPLINGS)
    time_location: float = option(0.0, "location of logit_normal times; values above 0 mean more noise")
    time_scale: float = option(1.0, "scale of logit_normal times", minimum=0)


def training_times(uniform: torch.Tensor, options: TimeOptions) -> torch.Tensor:
    """Times [N] from uniform numbers [N] in [0, 1), one per sample of the global batch."""
    return TIME_SAMPLINGS[options.time_sampling](uniform, options)
