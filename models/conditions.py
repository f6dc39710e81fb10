"""What a velocity is conditioned on, the null condition that stands for "nothing", and how dense maps enter a network."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from options import option

__all__ = ["Condition", "ConditionOptions", "DenseConditioned", "DenseInput", "drop_labels"]


class Condition(NamedTuple):
    """Condition of a velocity network; the empty one is `Condition()`.

    `labels`: class ids [B], where id K (the number of classes) is the null class. `dense`: a map [B, K, h, w] as large as
    the latents, where zeros everywhere stand for "nothing".
    """

    labels: torch.Tensor | None = None
    dense: torch.Tensor | None = None


def drop_labels(labels: torch.Tensor, uniform: torch.Tensor, probability: float, num_classes: int) -> torch.Tensor:
    """Labels [B] with each one replaced by the null class where `uniform` [B] falls below `probability`.

    The label dropout of classifier-free guidance (Ho & Salimans 2022, algorithm 1).
    """
    return torch.where(uniform < probability, num_classes, labels)


@dataclass(frozen=True)
class ConditionOptions:
    """Dense condition."""

    condition_dropout: float = option(
        0.0, "probability of hiding it in training; above 0, --cfg_scale can lead away from it", minimum=0, maximum=1
    )


@dataclass(frozen=True)
class DenseInput:
    """What a network sees beside x_t: `channels` of its input, which come as they are or from a map of `classes`.

    `dropout` is the probability with which training showed nothing instead; above 0, there is a null condition.
    """

    channels: int
    classes: int | None = None
    dropout: float = 0.0


class DenseConditioned(nn.Module):
    """A velocity network whose input is x_t followed by a dense map: [x_t (c), map (channels)] (LFM, section 5.3).

    A map of K classes first goes through `channel_mapper`, a 1x1 convolution without bias that is trained along. The state
    dict has the inner network's own names, which are the published ones, and `channel_mapper.weight`.

    Args:
        network: takes c + dense.channels channels.
        dense: the map's kind.
    """

    def __init__(self, network: nn.Module, dense: DenseInput) -> None:
        super().__init__()
        self.network = network
        mapped = dense.classes is not None
        self.channel_mapper = nn.Conv2d(dense.classes or 1, dense.channels, 1, bias=False) if mapped else nn.Identity()
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, t: torch.Tensor, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Velocity [B, c, h, w] at times t, [] or [B], and points x [B, c, h, w] under a condition with a dense map."""
        if condition.dense is None:
            raise ValueError("this network needs a dense map [B, K, h, w]: Condition(labels, dense)")
        return self.network(t, torch.cat([x, self.channel_mapper(condition.dense)], dim=1), condition)


INNER = "network."


def _without_prefix(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + name.removeprefix(prefix).removeprefix(INNER)] = state.pop(name)


def _with_prefix(
    module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *others: Any
) -> None:  # of what torch passes on, only the names matter
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        if not own.startswith(("channel_mapper.", INNER)):
            state[f"{prefix}{INNER}{own}"] = state.pop(name)
