"""Exponential moving average of a network's weights: the network that is sampled and saved."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from runtime.parallel import local_shard, reshard

__all__ = ["Ema"]


class Ema:
    """Moving average of a network's weights, in place, with a warm-up that makes it right from the first step.

    After update number n the decay is min(decay, (1 + n) / (10 + n)), so the average forgets its random initial value at
    once. `network` is a copy of the network that always has the averaged weights; buffers are averaged as well, or copied
    if they are no floats. Where weights are shared out among processes, each process averages its part, so both networks must
    be shared out alike.

    Args:
        network: the network to follow, without any parallel wrapper.
        decay: the final decay per step, in [0, 1); 0 follows the network exactly.
        place: brings the copy to where it is to be, in place; None: it stays where `network` is.
    """

    def __init__(self, network: nn.Module, decay: float, place: Callable[[nn.Module], object] | None = None) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        if place:
            place(self.network)
        self.updates = torch.zeros((), dtype=torch.float64, device=next(self.network.parameters()).device)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the averaged network."""
        return self.network.state_dict()

    @torch.no_grad()
    def update(self, network: nn.Module, keep: torch.Tensor | None = None) -> None:
        """Move the average towards the network's weights as they are now.

        `keep`, a 0-d tensor of 1 or 0 on the weights' device, decides without a word to the host whether it moves at all
        and whether the update counts.
        """
        keep = torch.ones_like(self.updates) if keep is None else keep.to(self.updates)
        self.updates += keep
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        rate = (keep * (1 - decay)).float()
        for each in (self.network, network):
            reshard(each)
        averages, currents = [], []
        for average, value in zip(_tensors(self.network), _tensors(network), strict=True):
            if value.is_floating_point():
                averages.append(local_shard(average))
                currents.append(local_shard(value))
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, currents, [rate] * len(averages))

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, tensors and numbers only."""
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`'s value; names and shapes must fit."""
        self.updates.fill_(state["updates"])
        self.network.load_state_dict(state["weights"])


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]
