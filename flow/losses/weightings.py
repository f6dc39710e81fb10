"""Weights of the loss over time, by name in WEIGHTINGS. The mean of each over uniform times in [0, 1] is 1.

An error of the velocity by e is an error of the data prediction by t e, and of the noise prediction by (1 - t) e, if
sigma_min is 0. So a weight on one of the three losses is a weight on the others. A weight per time does not change the
minimum of the squared error, only which times a network with limited capacity fits best.
"""

from collections.abc import Callable

import torch

__all__ = ["WEIGHTINGS"]

MIN_SNR = 5.0  # gamma of Hang et al. 2023


def _data(t: torch.Tensor) -> torch.Tensor:
    return 3 * t.square()


def _noise(t: torch.Tensor) -> torch.Tensor:
    return 3 * (1 - t).square()


def _min_snr(t: torch.Tensor) -> torch.Tensor:
    """min(SNR, gamma) on the loss of the data, with SNR = ((1 - t) / t)^2 (Hang et al. 2023, arXiv:2303.09556)."""
    crossing = 1 / (1 + MIN_SNR**0.5)  # where SNR = gamma
    mean = (MIN_SNR * crossing**3 + (1 - crossing) ** 3) / 3
    return torch.minimum((1 - t).square(), MIN_SNR * t.square()) / mean


def _cosmap(t: torch.Tensor) -> torch.Tensor:
    """2 / (pi - 2 pi t + 2 pi t^2), which matches the log-SNR of the cosine schedule (Esser et al. 2024, section 3.1)."""
    return 2 / (torch.pi * (1 - 2 * t + 2 * t.square()))


# Weights [B] of times t [B].
WEIGHTINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "constant": torch.ones_like,
    "data": _data,
    "noise": _noise,
    "min_snr": _min_snr,
    "cosmap": _cosmap,
}
