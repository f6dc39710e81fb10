"""Averages of a network's weights: an exponential moving average (EMA) for samples and checkpoints, and power averages."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from runtime.processes.parallel import local_shard, reshard
from training.averages.power import exponent_of

__all__ = ["Average", "Ema", "PowerEma"]


class Average(ABC):
    """Running average of a network's weights: update number n replaces it by decay * average + (1 - decay) * weights.

    `network` is a copy that holds the averaged weights. Floating-point buffers are averaged too; other buffers are copied. If
    the weights are sharded, each process averages its shard, so both networks must be sharded alike.

    Args:
        network: the network to average, without a parallel wrapper.
        move: moves or shards the copy in place; None: the copy stays on the device of `network`.
    """

    def __init__(self, network: nn.Module, move: Callable[[nn.Module], object] | None = None) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        if move:
            move(self.network)
        self.updates = torch.zeros((), dtype=torch.float64, device=next(self.network.parameters()).device)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the averaged network."""
        return self.network.state_dict()

    @abstractmethod
    def current_decay(self) -> torch.Tensor:
        """The decay of the latest of `updates`, 0-d float64 on their device."""

    @torch.no_grad()
    def update(self, network: nn.Module, keep: torch.Tensor | None = None) -> None:
        """Update the average with the network's current weights.

        `keep` is a 0-d tensor on the weights' device. If it is 0, the update is skipped and not counted. If it is 1 or missing,
        the update is applied. The host does not wait for the value.
        """
        keep = torch.ones_like(self.updates) if keep is None else keep.to(self.updates)
        self.updates += keep
        rate = (keep * (1 - self.current_decay())).float()
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


class Ema(Average):
    """Exponential moving average of a network's weights, with a warmup that makes it useful from the first step.

    Update number n has the decay min(decay, (1 + n) / (10 + n)), so the EMA quickly forgets the random initial weights.

    Args:
        network, move: see `Average`.
        decay: the final decay per update, in [0, 1]; 0 copies the weights.
    """

    def __init__(self, network: nn.Module, decay: float, move: Callable[[nn.Module], object] | None = None) -> None:
        super().__init__(network, move)
        self.decay = decay

    @property
    def warmup_updates(self) -> int:
        """Number of updates after which the decay is final; very many for a decay of 1."""
        return max(0, math.ceil((10 * self.decay - 1) / max(1 - self.decay, 1e-12)))

    def current_decay(self) -> torch.Tensor:
        """The decay after the warmup, or less within it."""
        return ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)


class PowerEma(Average):
    """Power average of a network's weights (Karras et al. 2024, arXiv 2312.02696, section 3).

    Update number k has the decay (1 - 1/k)^(gamma + 1), so the first one copies the weights. The averaged span grows with the
    run: its width stays a fixed share of the updates.

    Args:
        network, move: see `Average`.
        sigma_rel: the relative width; it determines gamma (`exponent_of`).
    """

    def __init__(self, network: nn.Module, sigma_rel: float, move: Callable[[nn.Module], object] | None = None) -> None:
        super().__init__(network, move)
        self.sigma_rel = sigma_rel
        self._exponent = exponent_of(sigma_rel) + 1

    def current_decay(self) -> torch.Tensor:
        """The decay of a power average."""
        return (1 - 1 / self.updates).clamp(min=0) ** self._exponent


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]
