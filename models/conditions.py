"""Conditions of velocity networks: labels, dense maps, parameters of augmentation, and null conditions.

`DenseConditioned` wraps a network that takes a dense map as input. `AugmentationEmbedding` is the part of a network that takes
the parameters of augmentation (Karras et al. 2022, arXiv:2206.00364, section 5 and appendix F.2): the network learns how
training images were changed, and samples under zeros, the parameters of unchanged images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from options import option

__all__ = [
    "AUGMENTATIONS",
    "AugmentationEmbedding",
    "Condition",
    "ConditionOptions",
    "DenseConditioned",
    "DenseInput",
    "add_augmentation",
    "count_parameters",
    "drop_labels",
    "new_augmentation_embedding",
    "null_condition",
]

# The parameters of each kind of augmentation, in [-1, 1]; all are 0 in an unchanged image (datasets_prep/augmentation/).
AUGMENTATIONS: Mapping[str, tuple[str, ...]] = {
    "flip": ("mirrored",),
    "crop": ("zoom", "shift_x", "shift_y"),
    "color": ("brightness", "contrast", "saturation"),
}


class Condition(NamedTuple):
    """Condition of a velocity network; `Condition()` is empty.

    `labels`: class ids [B], where id K (the number of classes) is the null class. `dense`: a map [B, K, h, w] with the
    latents' height and width; the null condition is a map of zeros. `augmentation`: parameters [B, P] of the augmentation of
    training images; None stands for zeros.
    """

    labels: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    augmentation: torch.Tensor | None = None


def drop_labels(labels: torch.Tensor, uniform: torch.Tensor, probability: float, num_classes: int) -> torch.Tensor:
    """Replace labels [B] by the null class wherever `uniform` [B] is below `probability`.

    This is the label dropout of classifier-free guidance (Ho & Salimans 2022, algorithm 1).
    """
    return torch.where(uniform < probability, num_classes, labels)


def null_condition(
    labels: torch.Tensor, dense: torch.Tensor | None, label_dropout: float, dense_dropout: float, num_classes: int
) -> Condition:
    """The condition of a batch with every label and map dropped that is ever dropped in training.

    Args:
        labels: [B], before dropout.
        dense: maps [B, K, h, w].
        label_dropout: probability of dropping a label; 0: labels are kept.
        dense_dropout: probability of dropping a map; 0: maps are kept.
        num_classes: the null class.
    """
    null_labels = torch.full_like(labels, num_classes) if label_dropout else labels
    return Condition(null_labels, torch.zeros_like(dense) if dense is not None and dense_dropout else dense)


def count_parameters(kinds: Sequence[str]) -> int:
    """The number P of parameters of these kinds of augmentation."""
    return sum(len(AUGMENTATIONS[kind]) for kind in kinds)


class AugmentationEmbedding(nn.Linear):
    """Map the parameters of augmentation [B, P] to a term [B, D] of a network's embedding.

    The weights start at zero and there is no bias, so a new network's velocity does not depend on the parameters, and a trained
    network's velocity under zeros is that of the network without this layer.
    """

    def __init__(self, parameters: int, width: int) -> None:
        super().__init__(parameters, width, bias=False)

    def reset_parameters(self) -> None:
        """Set the weights to zero, without random numbers."""
        nn.init.zeros_(self.weight)


def new_augmentation_embedding(kinds: Sequence[str], width: int) -> AugmentationEmbedding | None:
    """The layer for these kinds of augmentation; None if there are none.

    A network names it `augment_embedder`, and creates it after its other weights are initialized.
    """
    return AugmentationEmbedding(count_parameters(kinds), width) if kinds else None


def add_augmentation(
    embedding: torch.Tensor, embedder: AugmentationEmbedding | None, condition: Condition
) -> torch.Tensor:
    """Add the term of the parameters of augmentation to an embedding [B, D], if the network and the condition have them."""
    if embedder is None or condition.augmentation is None:
        return embedding
    return embedding + embedder(condition.augmentation)


@dataclass(frozen=True)
class ConditionOptions:
    """Dense condition."""

    condition_dropout: float = option(
        0.0,
        "probability of dropping the dense condition in training; above 0, sampling can use --cfg_scale",
        minimum=0,
        maximum=1,
    )


@dataclass(frozen=True)
class DenseInput:
    """How a network takes a dense map as input.

    Args:
        channels: number of the network's input channels that hold the map.
        classes: number of classes of a label map, which the network maps to `channels`; None: the map is used unchanged.
        dropout: probability of dropping the map in training; above 0, there is a null condition.
    """

    channels: int
    classes: int | None = None
    dropout: float = 0.0


class DenseConditioned(nn.Module):
    """A velocity network whose input concatenates x_t and a dense map: [x_t (c), map (channels)] (LFM, section 5.3).

    A label map of K classes first passes through `channel_mapper`, a 1x1 convolution without bias that is trained with the
    network. The state dict uses the inner network's names, as LFM's checkpoints do; a label map adds `channel_mapper.weight`.

    Args:
        network: a network with c + dense.channels input channels.
        dense: the map's channels, classes and dropout.
    """

    def __init__(self, network: nn.Module, dense: DenseInput) -> None:
        super().__init__()
        self.network = network
        mapped = dense.classes is not None
        self.channel_mapper = nn.Conv2d(dense.classes or 1, dense.channels, 1, bias=False) if mapped else nn.Identity()
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, t: torch.Tensor, x: torch.Tensor, condition: Condition, **others: Any) -> torch.Tensor:
        """Velocity [B, c, h, w] at times t ([] or [B]) and points x [B, c, h, w], under a condition with a dense map.

        The network gets the `others` unchanged.
        """
        if condition.dense is None:
            raise ValueError("this network needs a dense map [B, K, h, w]: pass Condition(labels, dense)")
        return self.network(t, torch.cat([x, self.channel_mapper(condition.dense)], dim=1), condition, **others)


INNER = "network."


def _without_prefix(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + name.removeprefix(prefix).removeprefix(INNER)] = state.pop(name)


def _with_prefix(
    module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *others: Any
) -> None:  # torch passes more arguments, which are not needed
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        if not own.startswith(("channel_mapper.", INNER)):
            state[f"{prefix}{INNER}{own}"] = state.pop(name)
