"""Terms of flow matching's training loss next to the squared error. Each is one number per sample."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from flow.losses.options import LossOptions

__all__ = ["TrainingDraws", "loss_terms"]

LEAST_NORM = 0.1  # of velocities whose direction counts


class TrainingDraws(NamedTuple):
    """The inputs of a training loss for each sample, next to data and noise.

    Args:
        t: times [N].
        weight: of the sample's loss [N].
        other_velocity: velocity of another sample of the global batch [N, C, h, w]; None without contrastive weight.
        contrast: weight of the distance from it [N]; 0 where the condition was dropped.
    """

    t: torch.Tensor
    weight: torch.Tensor
    other_velocity: torch.Tensor | None = None
    contrast: torch.Tensor | None = None


# term(predicted velocity [B, C, h, w], true velocity, draws) is a loss [B].
Term = Callable[[torch.Tensor, torch.Tensor, TrainingDraws], torch.Tensor]


def loss_terms(options: LossOptions) -> tuple[Term, ...]:
    """The terms that are switched on."""
    terms: list[Term] = []
    if options.velocity_direction:
        terms.append(lambda predicted, velocity, _: options.velocity_direction * direction_error(predicted, velocity))
    if options.contrastive_weight:
        terms.append(_contrast)
    return tuple(terms)


def direction_error(predicted: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """1 - cosine of both velocities over the channels, averaged over positions [B] (Yao et al. 2024, arXiv:2410.10356).

    Norms below LEAST_NORM count as LEAST_NORM. The published eps of 1e-8 would make the gradient of a velocity of zero, which
    a new DiT predicts, about 1e8. Adam with beta2 = 0.999 needs tens of thousands of steps to forget it.
    """
    norms = (each.norm(dim=1).clamp(min=LEAST_NORM) for each in (predicted, velocity))
    cosine = (predicted * velocity).sum(1) / (next(norms) * next(norms))  # [B, h, w]
    return (1 - cosine).flatten(1).mean(1)


def _contrast(predicted: torch.Tensor, velocity: torch.Tensor, draws: TrainingDraws) -> torch.Tensor:
    """Minus the squared distance from another sample's velocity (Stoica et al. 2025, arXiv:2506.05350).

    It is 0 without another sample, as in validation.
    """
    if draws.other_velocity is None or draws.contrast is None:
        return torch.zeros_like(draws.t)
    return -draws.contrast * (predicted - draws.other_velocity).square().flatten(1).mean(1)
