"""Exponential moving average (EMA) of a network's weights, which is used for samples and checkpoints."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from runtime.processes.parallel import local_shard, reshard

__all__ = ["Ema"]


class Ema:
    """Exponential moving average of a network's weights, with a warmup that makes it useful from the first step.

    Update number n has the decay min(decay, (1 + n) / (10 + n)), so the EMA quickly forgets the random initial weights.
    `network` is a copy that holds the EMA weights. Floating-point buffers are averaged too; other buffers are copied. If the
    weights are sharded, each process averages its shard, so both networks must be sharded alike.

    Args:
        network: the network to average, without a parallel wrapper.
        decay: the final decay per update, in [0, 1]; 0 copies the weights.
        move: moves or shards the copy in place; None: the copy stays on the device of `network`.
    """

    def __init__(self, network: nn.Module, decay: float, move: Callable[[nn.Module], object] | None = None) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        if move:
            move(self.network)
        self.updates = torch.zeros((), dtype=torch.float64, device=next(self.network.parameters()).device)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the EMA network."""
        return self.network.state_dict()

    @property
    def warmup_updates(self) -> int:
        """Number of updates after which the decay is final; very many for a decay of 1."""
        return max(0, math.ceil((10 * self.decay - 1) / max(1 - self.decay, 1e-12)))

    @torch.no_grad()
    def update(self, network: nn.Module, keep: torch.Tensor | None = None) -> None:
        """Update the EMA with the network's current weights.

        `keep` is a 0-d tensor on the weights' device. If it is 0, the update is skipped and not counted. If it is 1 or missing,
        the update is applied. The host does not wait for the value.
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
        """The state that `load_state_dict` restores, made of tensors only."""
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict()`. Names and shapes must match."""
        self.updates.fill_(state["updates"])
        self.network.load_state_dict(state["weights"])


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]
