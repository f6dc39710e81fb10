"""Exponential moving average of a network's weights: the network that is sampled and saved."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["Ema"]


class Ema:
    """Moving average of a network's weights, in place, with a warm-up that makes it right from the first step.

    After update number n the decay is min(decay, (1 + n) / (10 + n)), so the average forgets its random initial value at
    once. `network` is a copy of the network that always has the averaged weights; buffers that are no floats are copied.

    Args:
        network: the network to follow, without any parallel wrapper.
        decay: the final decay per step, in [0, 1); 0 follows the network exactly.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.weights = self.network.state_dict()

    @torch.no_grad()
    def update(self, network: nn.Module, keep: torch.Tensor | None = None) -> None:
        """Move the average towards the network's weights as they are now.

        `keep`, a 0-d tensor of 1 or 0 on the weights' device, decides without a word to the host whether it moves at all.
        """
        self.updates += 1
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, currents = [], []
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                averages.append(self.weights[name])
                currents.append(value)
            else:
                self.weights[name].copy_(value)
        if keep is None:
            torch._foreach_lerp_(averages, currents, rate)
        else:
            torch._foreach_lerp_(averages, currents, [rate * keep] * len(averages))

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, tensors and numbers only."""
        return {"updates": self.updates, "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`'s value; names and shapes must fit."""
        self.updates = state["updates"]
        self.network.load_state_dict(state["weights"])
