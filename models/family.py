"""What a family of velocity networks is: its options, its constructor, and what training and loading need to know of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from options import UsageError, option

__all__ = ["ClassOptions", "Family", "FamilyOptions", "Weights", "check_sides"]

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class FamilyOptions:
    """Every network."""

    class_flag: ClassVar[str] = "num_classes"  # the option that holds the number of classes
    null_class_has_weights: ClassVar[bool] = True  # whether a state dict shows if labels were dropped

    num_in_channels: int = option(4, "channels of the network's input; default: those of the latents", minimum=1)
    num_out_channels: int = option(4, "channels of the velocity; default: those of the latents", minimum=1)
    label_dropout: float = option(
        0.0, "probability of dropping a label in training; above 0: a null class", minimum=0, maximum=1
    )
    use_grad_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")

    @property
    def classes(self) -> int:
        """Number of classes K, which is also the null class's id; 1: unconditional."""
        return 1


@dataclass(frozen=True)
class ClassOptions(FamilyOptions):
    """Classes of DiT, of unet and with --use_origin_adm."""

    num_classes: int | None = option(None, "number of classes; default: unconditional", minimum=1)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.num_classes or 1

    @property
    def label_rows(self) -> int:
        """Rows of the label table (0: none): one per class, and the null class where labels are dropped."""
        return self.num_classes + (self.label_dropout > 0) if self.num_classes else 0


def _no_matrices(network: nn.Module) -> list[nn.Parameter]:
    return []


def _as_stored(own: Weights, stored: Weights) -> Weights:
    return stored


class Family(NamedTuple):
    """A model type, as models.registry.NETWORKS registers it.

    Args:
        options: the dataclass of its options.
        build: (latent side, options) to the network with fresh weights.
        hidden_matrices: the parameters [rows, columns] that Muon may train; empty: Muon is not for this family.
        fit_grid: (the network's own state dict, a stored one) to the stored one, adapted to the network's grid of positions.
    """

    options: type[FamilyOptions]
    build: Callable[[int, Any], nn.Module]
    hidden_matrices: Callable[[nn.Module], list[nn.Parameter]] = _no_matrices
    fit_grid: Callable[[Weights, Weights], Weights] = _as_stored


def check_sides(height: int, width: int, levels: int, whose: str) -> None:
    """Refuse latents that cannot be halved once per level; `whose` the levels are stands in the message.

    Raises:
        UsageError: that.
    """
    for side in (height, width):
        if side % 2 ** (levels - 1):
            raise UsageError(
                f"latents of side {side} cannot be halved {levels - 1} times, as the {levels} levels of {whose} ask for: "
                "choose another --image_size, or a network with fewer levels"
            )
