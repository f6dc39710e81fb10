"""Contrastive flow matching (Stoica et al. 2025, arXiv:2506.05350): other samples, and the correction under guidance.

Next to the squared error, the loss has the term -w |v_hat - v_other|^2, where v_other is the velocity of another sample of the
global batch, if possible of another class. For a weight w < 1, the loss is least where its gradient is zero:

    v_hat (1 - w) = E[v | x_t, class] - w E[v_other],    E[v_other] = E[(1 - s) noise - data] = -m,

where m is the mean latent of the other classes, because the other sample is independent of x_t and noise has mean zero. So

    v_hat = v + w / (1 - w) (v + m) = v + w / (1 - w) (v - E[v_other]):

guidance of scale 1 / (1 - w) away from the constant velocity -m, without a second network evaluation. Samples with a dropped
condition have no such term, so the null class has the plain velocity. Classifier-free guidance extrapolates from the null
class to a class, and needs both on the same scale. `Correction` therefore solves for v = (1 - w) v_hat - w m where guidance
acts; elsewhere the velocity stays v_hat.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from flow.guidance import Network

__all__ = ["Correction", "correct", "means_of_others", "next_of_another_class"]

MOST_NUMBERS = 1 << 18  # of the means by class in a header; beyond, one mean of all classes


def next_of_another_class(labels: torch.Tensor) -> torch.Tensor:
    """For each sample of a batch in random order, the index [N] of the next one, cyclically, of another class.

    It is the next sample if all have one class. Batches are shuffled, so this is a random sample of the other classes.

    Args:
        labels: class ids [N], on the CPU.
    """
    count = len(labels)
    after = torch.arange(1, count + 1)  # indices beyond the end continue from the start
    changes = labels != labels.roll(-1)
    if not changes.any():
        return after % count
    # The first change at or after each index; the second round finds those beyond the end.
    found = torch.where(changes.repeat(2), torch.cat([after, after + count]), 2 * count)
    return found.flip(0).cummin(0).values.flip(0)[:count] % count


def means_of_others(parts: Iterable[tuple[torch.Tensor, torch.Tensor]], classes: int) -> torch.Tensor:
    """The mean latent of the classes other than each class [K, C, h, w], or of all classes [1, C, h, w].

    The latter is for unconditional networks, and for so many classes that the difference is small and the table large.

    Args:
        parts: latents [B, C, h, w] with their class ids [B].
        classes: K.
    """
    sums: torch.Tensor | None = None
    counts = torch.zeros(classes, dtype=torch.float64)
    for latents, labels in parts:
        if sums is None:
            sums = torch.zeros(classes, *latents.shape[1:], dtype=torch.float64)
        sums.index_add_(0, labels.cpu(), latents.double().cpu())
        counts += labels.cpu().bincount(minlength=classes)
    assert sums is not None
    total, number = sums.sum(0, keepdim=True), counts.sum()
    if classes == 1 or sums.numel() > MOST_NUMBERS:
        return total / number
    others = (number - counts).view(-1, 1, 1, 1)
    return torch.where(others > 0, (total - sums) / others.clamp(min=1), total / number)


@dataclass(frozen=True)
class Correction:
    """The velocity v of the data, given the velocity v_hat that a contrastive loss has taught.

    Args:
        weight: w.
        means: mean latents of the other classes [K, C, h, w] or of all classes [1, C, h, w].
        null: id of the null class, which the contrastive loss leaves out.
    """

    weight: float
    means: torch.Tensor
    null: int

    def __call__(self, velocity: torch.Tensor, condition: Any) -> torch.Tensor:
        """v [B, C, h, w] from v_hat under a condition with labels [B]."""
        labels = condition.labels
        means = self.means.to(velocity)
        mean = means[labels.clamp(max=len(means) - 1)]
        corrected = (1 - self.weight) * velocity - self.weight * mean
        return torch.where((labels == self.null).view(-1, 1, 1, 1), velocity, corrected)


def correct(network: Network, correction: Correction | None) -> Network:
    """The network with a corrected velocity; the network itself without a correction."""
    if correction is None:
        return network
    return lambda t, x, condition, **others: correction(network(t, x, condition, **others), condition)
