"""What a velocity is conditioned on, and the null class that stands for "nothing"."""

from typing import NamedTuple

import torch

__all__ = ["Condition", "drop_labels"]


class Condition(NamedTuple):
    """Condition of a velocity network; the empty one is `Condition()`.

    `labels`: class ids [B], where id K (the number of classes) is the null class. `dense`: a map [B, K, h', w'].
    """

    labels: torch.Tensor | None = None
    dense: torch.Tensor | None = None


def drop_labels(labels: torch.Tensor, uniform: torch.Tensor, probability: float, num_classes: int) -> torch.Tensor:
    """Labels [B] with each one replaced by the null class where `uniform` [B] falls below `probability`.

    The label dropout of classifier-free guidance (Ho & Salimans 2022, algorithm 1).
    """
    return torch.where(uniform < probability, num_classes, labels)
