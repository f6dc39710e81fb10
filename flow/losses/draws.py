"""Random draws and losses of a training step."""

from typing import Any, NamedTuple, Protocol

import torch

__all__ = ["Draws", "RandomStreams", "Times", "TrainingLosses"]

# A named tuple of tensors [N, ...], with one entry per sample of the batch, of None, and of further such named tuples.
Draws = tuple[Any, ...]


class RandomStreams(Protocol):
    """The random numbers of one training step, by purpose; a new purpose does not change the numbers of other purposes."""

    step: int  # number of the step, from 0
    last_step: int  # number of steps of the run

    def uniform(self, purpose: str) -> torch.Tensor:
        """Uniform numbers [N] in [0, 1), one per sample of the global batch."""
        ...

    def normal(self, purpose: str) -> torch.Tensor:
        """Standard normal numbers [N, C, h, w], with the shape of the global batch's latents."""
        ...

    def number(self, purpose: str) -> float:
        """A uniform number in [0, 1) for the whole step, on the host."""
        ...


class Times(NamedTuple):
    """The draws of plain flow matching: times t [N] in [0, 1]."""

    t: torch.Tensor


class TrainingLosses(NamedTuple):
    """Losses of a training step.

    Args:
        total: losses [B] whose mean the step minimizes.
        logged: losses [B] without gradients by name, "loss" first.
    """

    total: torch.Tensor
    logged: dict[str, torch.Tensor]
