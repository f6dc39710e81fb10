"""The state of a training run: what changes, the optimizer step that changes it, and how it is saved and restored."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from flow.objectives import Objective
from runtime.cpu_kernels import with_cpu_kernels
from runtime.distributed import Processes
from runtime.parallel import arranged_like, gather_dtensor, gather_state, local_gradients
from runtime.precision import Machine
from training.data import Batch
from training.ema import Ema
from training.optimizers import OptimizerOptions, load_optimizer_state, make_optimizers

__all__ = ["TrainingState"]


class TrainingState:
    """Network, average, optimizer and position of a run.

    Args:
        network: the velocity network, anywhere.
        machine: device and precision.
        ema_decay: decay of the average; 0: none.
        optimizer: how the weights are moved.
        place: brings a network to where it is trained, in place; None: to the machine's device.
        hidden_matrices: the network family's, for Muon.
    """

    def __init__(
        self,
        network: nn.Module,
        machine: Machine,
        ema_decay: float,
        optimizer: OptimizerOptions,
        place: Callable[[nn.Module], object] | None = None,
        hidden_matrices: Callable[[nn.Module], list[nn.Parameter]] | None = None,
    ) -> None:
        place = place or (lambda module: module.to(machine.device))
        self.network = with_cpu_kernels(network)  # before its average is made, which is a copy
        self.machine = machine
        self.ema = Ema(network, ema_decay, place)
        place(network)
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        matrices = hidden_matrices(network) if hidden_matrices else []
        self.optimizers = make_optimizers(network, optimizer, machine.precision, matrices)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
        self.step = 0
        self.seconds = 0.0
        self.best = math.inf
        self.best_of = ""  # what `best` is a value of
        # Sums since the last line of the metrics log, kept on the device: loss, gradient norm, skipped steps, steps.
        self.sums = torch.zeros(4, device=machine.device)
        # For each step since they were last taken, 1 where it was skipped; and the length of the series of skipped steps that
        # goes on, with the loss of its first one. On the device, too.
        self._flags: list[torch.Tensor] = []
        self.streak = torch.zeros(2, device=machine.device)
        self._good, self._skipped = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]], device=machine.device)

    def advance(
        self,
        network: nn.Module,
        objective: Objective,
        batch: Batch,
        rate: float,
        grad_clip: float,
        accumulation: int = 1,
    ) -> None:
        """One optimizer step on the objective's mean loss at learning rate `rate`.

        `network` is the state's own, perhaps compiled or wrapped for several processes. The batch goes through it in
        `accumulation` equal parts, whose gradients add up to the whole batch's. A step whose gradient is not finite changes
        neither the weights nor the optimizer state nor the average; it is counted without the host waiting for the device.
        """
        for parameter in self.parameters:
            parameter.grad = None
        *first, last = batch.split(accumulation)
        loss = torch.zeros((), device=self.machine.device)
        with local_gradients(network) if first else nullcontext():
            for part in first:
                loss += self._backward(network, objective, part, accumulation)
        loss += self._backward(network, objective, last, accumulation)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = gather_dtensor(get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if grad_clip:
            clip_grads_with_norm_(self.parameters, grad_clip, norm)
        bad = (~torch.isfinite(norm)).float()
        for optimizer in self.optimizers:
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # the switch to skip the step
            for group in optimizer.param_groups:
                group["lr"] = rate * group["relative_lr"]
            optimizer.step()
        self.scaler.update()
        self.ema.update(self.network, 1 - bad)
        zero = torch.zeros_like(norm)
        good = self._good + torch.stack([loss, norm, zero, zero])
        self.sums += torch.where(bad > 0, self._skipped, good)
        length, first_loss = self.streak
        longer = torch.stack([length + 1, torch.where(length > 0, first_loss, loss)])
        self.streak = torch.where(bad > 0, longer, 0.0)
        self._flags.append(bad)
        self.step += 1

    def take_skipped(self) -> list[int]:
        """The steps since the last call, counted from 1 on, that were skipped; the host waits for the device."""
        first = self.step - len(self._flags) + 1
        flags = torch.stack(self._flags).tolist() if self._flags else []
        self._flags = []
        return [first + place for place, flag in enumerate(flags) if flag]

    def _backward(self, network: nn.Module, objective: Objective, part: Batch, parts: int) -> torch.Tensor:
        """Add the gradient of a part's mean loss, divided by the number of `parts`; returns that loss."""
        losses = objective.loss(self.machine.evaluating(network), part.data, part.noise, part.draws, part.condition)
        loss = losses.mean() / parts
        self.scaler.scale(loss).backward()
        return loss.detach()

    def content(self, processes: Processes = Processes()) -> dict[str, Any]:  # noqa: B008
        """All that an exact resume needs; random streams are functions of the step and need no saving.

        The same whether the weights are shared out among the processes or not. Every process must call it, and the main
        one gets the content.
        """
        sums = processes.gather(self.sums.cpu())
        content = {
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "best_of": self.best_of,
            "sums": torch.stack(sums) if sums else self.sums,  # a row for each process
            "flags": torch.stack(self._flags) if self._flags else torch.zeros(0),
            "streak": self.streak,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),  # empty but in fp16
        }
        return gather_state(content, keep=processes.is_main)

    def restore(self, content: Mapping[str, Any], processes: Processes = Processes()) -> None:  # noqa: B008
        """Continue from `content()`'s value, of as many processes or of another number."""
        self.step, self.seconds = content["step"], content["seconds"]
        self.best, self.best_of = content["best"], content["best_of"]
        sums = content["sums"].view(-1, len(self.sums))
        self.sums.copy_(sums[processes.rank] if len(sums) == processes.count else sums.mean(0))
        if content.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        if "streak" in content:  # not in older files
            self.streak = content["streak"].to(self.sums)
            self._flags = list(content["flags"].to(self.sums))
        self.network.load_state_dict(_parts(content["network"], self.network.state_dict()))
        average = content["ema"] | {"weights": _parts(content["ema"]["weights"], self.ema.weights)}
        self.ema.load_state_dict(average)
        for optimizer, stored in zip(self.optimizers, content["optimizers"], strict=True):
            load_optimizer_state(optimizer, stored["state"])


def _parts(weights: Mapping[str, torch.Tensor], models: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, those shared out that are so in `models`."""
    return {name: arranged_like(value, models[name]) if name in models else value for name, value in weights.items()}
