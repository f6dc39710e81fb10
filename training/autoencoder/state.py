"""The state of an autoencoder's training. It takes optimizer steps, and can be saved and restored."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from runtime.distributed import Processes
from runtime.precision import Machine
from training.autoencoder.data import PixelBatch
from training.autoencoder.networks import make_optimizers
from training.autoencoder.options import AutoencoderTrainingOptions
from training.autoencoder.terms.protocol import TrainedModule
from training.ema import Ema
from training.optimizers import load_optimizer_state
from training.state import Progress, take_step

__all__ = ["ENTRIES", "AutoencoderState"]

GRAD_CLIP = 1.0
ENTRIES = frozenset(("step", "seconds", "sums", "network", "ema", "optimizers", "modules"))


class AutoencoderState(Progress):
    """Network, EMA, optimizers, further trained modules and progress of a run.

    Args:
        network: the network, on the machine's device.
        options: optimizers and EMA.
        machine: device and precision.
        names: names of the loss's logged values.
        modules: modules that terms of the loss train, by name.
    """

    def __init__(
        self,
        network: nn.Module,
        options: AutoencoderTrainingOptions,
        machine: Machine,
        names: tuple[str, ...],
        modules: Mapping[str, TrainedModule],
    ) -> None:
        super().__init__(machine.device, names)
        self.network = network
        self.modules = dict(modules)
        self.ema = Ema(network, options.ema_decay)
        self.optimizers = make_optimizers(network, options)
        self.parameters = _parameters_of(self.optimizers)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")

    @property
    def all_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of the network and of the other modules."""
        return [*self.optimizers, *(trained.optimizer for trained in self.modules.values())]

    def advance(self, loss_step: nn.Module, batch: PixelBatch, rate: float) -> None:
        """Take one step of all optimizers. A network or module whose gradient is not finite is not updated.

        Args:
            loss_step: a `LossStep`, perhaps wrapped for several processes.
            batch: this process's batch.
            rate: the learning rate.
        """
        for optimizer in self.all_optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses = loss_step(batch.pixels, batch.draws, self.step)
        self.scaler.scale(losses.total).backward()
        for optimizer in self.all_optimizers:
            if any(parameter.grad is not None for parameter in _parameters_of([optimizer])):
                self.scaler.unscale_(optimizer)
        for trained in self.modules.values():
            parameters = _parameters_of([trained.optimizer])
            take_step([trained.optimizer], parameters, rate, trained.grad_clip)
        norm, bad = take_step(self.optimizers, self.parameters, rate, GRAD_CLIP)
        self.scaler.update()
        self.ema.update(self.network, 1 - bad)
        self.count(
            torch.cat([losses.total.detach().float().view(1), losses.logged]), norm.to(self.sums), bad.to(self.sums)
        )

    def content(self, processes: Processes = Processes()) -> dict[str, Any]:  # noqa: B008
        """The training state, everything that an exact resume needs. Every process must call this.

        Random numbers depend only on the step, so none are saved.
        """
        return {
            **self.progress(processes),
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "modules": {
                name: {"module": trained.module.state_dict(), "optimizer": trained.optimizer.state_dict()}
                for name, trained in self.modules.items()
            },
            "scaler": self.scaler.state_dict(),  # empty except in fp16
        }

    def restore(self, content: Mapping[str, Any], processes: Processes = Processes()) -> None:  # noqa: B008
        """Restore the result of `content()`, which may have been saved by another number of processes."""
        self.restore_progress(content, processes)
        if content.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.network.load_state_dict(content["network"])
        self.ema.load_state_dict(content["ema"])
        for optimizer, stored in zip(self.optimizers, content["optimizers"], strict=True):
            load_optimizer_state(optimizer, stored["state"])
        for name, trained in self.modules.items():
            trained.module.load_state_dict(content["modules"][name]["module"])
            load_optimizer_state(trained.optimizer, content["modules"][name]["optimizer"]["state"])


def _parameters_of(optimizers: list[torch.optim.Optimizer]) -> list[nn.Parameter]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
