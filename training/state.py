"""The state of a training run. It takes optimizer steps, and can be saved and restored."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from flow.auxiliary.objective import training_losses
from flow.flow_maps.networks import StepNetwork
from flow.objectives import Objective
from options import UsageError
from runtime.cpu.kernels import with_cpu_kernels
from runtime.distributed import Processes
from runtime.precision import Machine
from runtime.processes.parallel import arranged_like, gather_dtensor, gather_state, local_gradients
from training.data import Batch
from training.ema import Average, Ema, PowerEma
from training.optimizers import OptimizerOptions, load_optimizer_state, make_optimizers

__all__ = ["POSTHOC_EMA", "Progress", "TrainingState", "take_step"]

POSTHOC_EMA = "posthoc_ema"  # entry of a training state with power averages


class Progress:
    """Steps and seconds of a run, and sums over its recent steps, which stay on the device so that the host does not wait.

    Args:
        device: where the sums are.
        auxiliary: names of the auxiliary losses, whose sums are kept for the metrics log.
    """

    def __init__(self, device: torch.device, auxiliary: Sequence[str] = ()) -> None:
        self.step = 0
        self.seconds = 0.0
        # Sums since the last line of the metrics log: loss, gradient norm, skipped steps, steps, auxiliary losses.
        self.auxiliary = tuple(auxiliary)
        self.sums = torch.zeros(4 + len(auxiliary), device=device)
        # One flag per step since the last `take_skipped`: 1 if the step was skipped.
        self._flags: list[torch.Tensor] = []
        # Number of skipped steps in a row up to now, and the loss of the first of them.
        self.consecutive_skips = torch.zeros(2, device=device)
        rest = [0.0] * len(auxiliary)
        counts = [[0.0, 0.0, 0.0, 1.0, *rest], [0.0, 0.0, 1.0, 1.0, *rest]]
        self._good, self._skipped = torch.tensor(counts, device=device)

    def count(self, losses: torch.Tensor, norm: torch.Tensor, bad: torch.Tensor) -> None:
        """Count a step.

        Args:
            losses: the loss and the auxiliary losses, [1 + number of names].
            norm: the gradient norm, 0-d.
            bad: 1 if the step was skipped, else 0; 0-d.
        """
        loss, *others = losses
        zero = torch.zeros_like(norm)
        good = self._good + torch.stack([loss, norm, zero, zero, *others])
        self.sums += torch.where(bad > 0, self._skipped, good)
        count, first_loss = self.consecutive_skips
        one_more = torch.stack([count + 1, torch.where(count > 0, first_loss, loss)])
        self.consecutive_skips = torch.where(bad > 0, one_more, 0.0)
        self._flags.append(bad)
        self.step += 1

    def take_skipped(self) -> list[int]:
        """The steps, counted from 1, that were skipped since the last call. The host waits for the device."""
        first = self.step - len(self._flags) + 1
        flags = torch.stack(self._flags).tolist() if self._flags else []
        self._flags = []
        return [first + index for index, flag in enumerate(flags) if flag]

    def progress(self, processes: Processes) -> dict[str, Any]:
        """The entries of a training state that `restore_progress` reads. Every process must call this."""
        sums = processes.gather(self.sums.cpu())
        return {
            "step": self.step,
            "seconds": self.seconds,
            "sums": torch.stack(sums) if sums else self.sums,  # one row per process
            "flags": torch.stack(self._flags) if self._flags else torch.zeros(0),
            "streak": self.consecutive_skips,
        }

    def restore_progress(self, content: Mapping[str, Any], processes: Processes) -> None:
        """Restore the result of `progress()`, which may have been saved by another number of processes."""
        self.step, self.seconds = content["step"], content["seconds"]
        sums = content["sums"].view(-1, len(self.sums))
        self.sums.copy_(sums[processes.rank] if len(sums) == processes.count else sums.mean(0))
        if "streak" in content:  # absent from older files
            self.consecutive_skips = content["streak"].to(self.sums)
            self._flags = list(content["flags"].to(self.sums))


def take_step(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter], rate: float, grad_clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip the parameters' gradients and take a step of each optimizer, unless a gradient is not finite.

    Args:
        optimizers: their parameter groups have an entry "relative_lr".
        parameters: the parameters of all of them.
        rate: the learning rate, times each group's "relative_lr".
        grad_clip: maximum gradient norm; 0: no clipping.

    Returns:
        The gradient norm before clipping, and 1 if the step was skipped, else 0. Both are 0-d.
    """
    norm = gather_dtensor(get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if grad_clip:
        clip_grads_with_norm_(parameters, grad_clip, norm)
    bad = (~torch.isfinite(norm)).float()
    for optimizer in optimizers:
        optimizer.found_inf = bad  # type: ignore[attr-defined]  # skips the step where it is 1
        for group in optimizer.param_groups:
            group["lr"] = rate * group["relative_lr"]
        optimizer.step()
    return norm, bad


class TrainingState(Progress):
    """Network, EMA, optimizers and progress of a run.

    Args:
        network: the velocity network, on any device.
        machine: device and precision.
        ema_decay: decay of the EMA; 0: no averaging.
        optimizer: the optimizer's options.
        move: moves or shards a network in place; None: it moves to the machine's device.
        hidden_matrices: selects the network's parameters for Muon.
        posthoc_ema: relative widths of the power averages to track.
        auxiliary: names of the auxiliary losses, whose sums are kept for the metrics log.
    """

    def __init__(
        self,
        network: nn.Module,
        machine: Machine,
        ema_decay: float,
        optimizer: OptimizerOptions,
        move: Callable[[nn.Module], object] | None = None,
        hidden_matrices: Callable[[nn.Module], list[nn.Parameter]] | None = None,
        posthoc_ema: Sequence[float] = (),
        auxiliary: Sequence[str] = (),
    ) -> None:
        super().__init__(machine.device, auxiliary)
        move = move or (lambda module: module.to(machine.device))
        self.network = with_cpu_kernels(network)  # before the EMA copies the network
        self.machine = machine
        self.ema = Ema(network, ema_decay, move)
        self.power_averages = [PowerEma(network, width, move) for width in posthoc_ema]
        move(network)
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        matrices = hidden_matrices(network) if hidden_matrices else []
        self.optimizers = make_optimizers(network, optimizer, machine.precision, matrices)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
        self.best = math.inf
        self.best_of = ""  # the validation criterion of `best`

    def advance(
        self,
        network: nn.Module,
        objective: Objective,
        batch: Batch,
        rate: float,
        grad_clip: float,
        accumulation: int = 1,
    ) -> None:
        """Take one optimizer step on the objective's mean loss.

        A step whose gradient is not finite is skipped: weights, optimizer state and EMA do not change. Skipped steps are
        counted on the device, so the host does not wait.

        Args:
            network: the state's network, possibly compiled or wrapped for several processes.
            objective: computes the loss.
            batch: this process's batch.
            rate: the learning rate.
            grad_clip: maximum gradient norm; 0: no clipping.
            accumulation: number of equal parts of the batch, whose gradients are accumulated one after the other.
        """
        for parameter in self.parameters:
            parameter.grad = None
        *first, last = batch.split(accumulation)
        losses = torch.zeros(1 + len(self.auxiliary), device=self.machine.device)
        with local_gradients(network) if first else nullcontext():
            for part in first:
                losses += self._backward(network, objective, part, accumulation)
        losses += self._backward(network, objective, last, accumulation)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm, bad = take_step(self.optimizers, self.parameters, rate, grad_clip)
        self.scaler.update()
        for average in (self.ema, *self.power_averages):
            average.update(self.network, 1 - bad)
        self.count(losses, norm, bad)

    def _backward(self, network: nn.Module, objective: Objective, part: Batch, parts: int) -> torch.Tensor:
        """Add the gradient of a part's mean loss divided by the number of `parts`.

        Returns:
            The divided means of the objective's loss and of the auxiliary losses, [1 + number of names].
        """
        evaluated = StepNetwork(
            self.machine.evaluating(network), self.network, self.machine.evaluating(self.ema.network)
        )
        losses = training_losses(objective, evaluated, part.data, part.noise, part.draws, part.condition)
        self.scaler.scale(losses.total.mean() / parts).backward()
        return torch.stack([each.mean() / parts for each in losses.logged.values()])

    def content(self, processes: Processes = Processes()) -> dict[str, Any]:  # noqa: B008
        """Gather the training state, everything that an exact resume needs.

        Random numbers depend only on the step, so none are saved. Sharded weights are gathered, so the result does not depend
        on sharding. Every process must call this; the main process gets the result.
        """
        content = {
            **self.progress(processes),
            "best": self.best,
            "best_of": self.best_of,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),  # empty except in fp16
        }
        if self.power_averages:
            content[POSTHOC_EMA] = {str(average.sigma_rel): average.state_dict() for average in self.power_averages}
        return gather_state(content, keep=processes.is_main)

    def restore(self, content: Mapping[str, Any], processes: Processes = Processes()) -> None:  # noqa: B008
        """Restore the result of `content()`, which may have been saved by another number of processes."""
        self.restore_progress(content, processes)
        self.best, self.best_of = content["best"], content["best_of"]
        if content.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.network.load_state_dict(_sharded_like(self.network.state_dict(), content["network"]))
        averages: dict[str, Average] = {"": self.ema} | {str(each.sigma_rel): each for each in self.power_averages}
        for name, stored in {"": content["ema"], **self._stored_averages(content)}.items():
            average = averages[name]
            average.load_state_dict(stored | {"weights": _sharded_like(average.weights, stored["weights"])})
        for optimizer, stored in zip(self.optimizers, content["optimizers"], strict=True):
            load_optimizer_state(optimizer, stored["state"])

    def _stored_averages(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """The power averages in a training state, by width.

        Raises:
            UsageError: their widths are not this run's.
        """
        stored, wanted = content.get(POSTHOC_EMA, {}), [str(average.sigma_rel) for average in self.power_averages]
        if set(stored) != set(wanted):
            raise UsageError(
                f"the training state has power averages of the widths {' '.join(stored) or '(none)'}, but --posthoc_ema asks "
                f"for {' '.join(wanted) or '(none)'}: give the same widths, which need every step since the first, or start "
                "another --exp"
            )
        return stored


def _sharded_like(own: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored tensors, each sharded like the network's own tensor of that name."""
    return {name: arranged_like(value, own[name]) if name in own else value for name, value in stored.items()}
