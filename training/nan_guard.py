"""Reports skipped steps and loss spikes, and ends a run that skips too many steps in a row."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from options import DivergedError
from runtime.distributed import Processes
from runtime.messages import warn
from runtime.precision import Machine
from runtime.processes.parallel import local_shard
from runtime.weights import count_bad, list_names
from training.ema import Average
from training.metrics_log import MetricsLog
from training.reading.order import first_images
from training.state_file import CONTENT

__all__ = ["LossHistory", "NanGuard", "check_loss", "check_trained"]

SPIKE = 3.0  # ratio of a spike to the running median
WINDOW, MIN_LOSSES = 21, 5  # losses that the median uses: at most, and at least
RETRY = "Repeat the command with --resume and a smaller --lr, --grad_clip 1 or --precision fp32"
LISTED_STEPS, LISTED_IMAGES = 10, 8  # at most, per log interval and per step


def check_trained(network: nn.Module, what: str) -> None:
    """Refuse a trained network with NaN or infinite weights; `what` names it.

    Raises:
        DivergedError: it has some.
    """
    if bad := _bad_parameters(network):
        raise DivergedError(
            f"the weights of the {what} are not finite, so they are not saved: {list_names(bad)}. Start again with a smaller "
            "--lr or --precision fp32"
        )


def check_loss(loss: float, step: int) -> None:
    """Check that the loss of an autoencoder's or classifier's training, which skips no steps, is finite.

    Raises:
        DivergedError: it is not.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss at step {step} is not finite (NaN or infinity): use a smaller --lr or --precision fp32, and check the "
            "images"
        )


class GuardedOptions(Protocol):
    """The options of a guarded run."""

    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def max_bad_steps(self) -> int: ...
    def rate_at(self, step: int, last_step: int) -> float: ...


class GuardedRun(Protocol):
    """What the guard needs of a run: see `training.run.TrainingRun`."""

    @property
    def folder(self) -> Path: ...
    @property
    def training(self) -> GuardedOptions: ...
    @property
    def source(self) -> Sized: ...
    @property
    def machine(self) -> Machine: ...
    @property
    def processes(self) -> Processes: ...


class GuardedState(Protocol):
    """What the guard needs of a state: see `training.state.TrainingState`."""

    step: int
    network: nn.Module
    consecutive_skips: torch.Tensor

    @property
    def ema(self) -> Average: ...
    def take_skipped(self) -> list[int]: ...


class LossHistory:
    """Mean losses of recent log intervals, which detect spikes.

    Args:
        past: losses of earlier intervals.
    """

    def __init__(self, past: Iterable[float] = ()) -> None:
        self._recent = deque(past, maxlen=WINDOW)

    def detect_spike(self, loss: float) -> float | None:
        """Add `loss` to the history; returns the median before it if `loss` exceeds SPIKE times that median, else None."""
        median = statistics.median(self._recent) if len(self._recent) >= MIN_LOSSES else math.inf
        self._recent.append(loss)
        return median if loss > SPIKE * median else None


class NanGuard:
    """Checks for loss spikes and skipped steps, once per log interval.

    Args:
        run: the run.
        state: its state, which counts skipped steps on the device.
        log: the metrics log, in the main process only.
        last_step: the run's last step.
    """

    def __init__(self, run: GuardedRun, state: GuardedState, log: MetricsLog | None, last_step: int) -> None:
        self._run = run
        self._state = state
        self._log = log
        self._last_step = last_step
        self._losses = LossHistory(log.past("train", "loss") if log else ())

    def report_loss(self, loss: float) -> None:
        """Record an interval's mean loss and print a warning if it is a spike."""
        median = self._losses.detect_spike(loss)
        if median is not None and self._log:
            self._log.write(self._state.step, "spike", {"loss": loss, "median": median})
            warn(f"step {self._state.step}: the loss rose to {loss:.4g} from a median of {median:.4g}")

    def report_skipped(self, ended: bool = False) -> None:
        """Record the steps skipped since the last call, and print a warning; also if the run has `ended` while skipping.

        Raises:
            DivergedError: --max_bad_steps steps in a row were skipped.
        """
        skipped = self._state.take_skipped()
        if skipped and self._log:
            listed = {step: self._images(step) for step in skipped[:LISTED_STEPS]}
            for step, images in listed.items():
                # Logged at the current step, so that a run that resumes from before it replaces the entry.
                self._log.write(self._state.step, "skipped", {"skipped_step": step, "indices": images})
            scaled = self._run.machine.precision == "fp16"
            steps = "1 step" if len(skipped) == 1 else f"{len(skipped)} steps"
            warn(
                f"skipped {steps} without a finite gradient, the first at step {skipped[0]} with images "
                f"{_listed(listed[skipped[0]])}"
                + (" (in fp16, a few are normal while the loss scale adapts)" if scaled else "")
            )
        limit = self._run.training.max_bad_steps
        if limit:
            count, first_loss = self._state.consecutive_skips.tolist()
            if count >= limit:
                raise DivergedError(self._diagnosis(int(count), first_loss))
        last = int(self._state.consecutive_skips[0]) if ended else 0
        if last > 1:
            warn(
                f"the run ended while steps were skipped: its last {last} steps had no effect, and its weights may be "
                "useless. A smaller --lr, --grad_clip 1 or --precision fp32 may help"
            )

    def check_weights(self) -> None:
        """Check the weights and their EMA before they are saved. Every process must call this.

        Weights can overflow although all gradients were finite, for example at a high learning rate.

        Raises:
            DivergedError: a weight is NaN or infinite.
        """
        state = self._state
        bad = dict.fromkeys([*_bad_parameters(state.network), *_bad_parameters(state.ema.network)])
        if self._run.processes.any(bool(bad)):
            raise DivergedError(
                f"at step {state.step}, weights are not finite: {list_names(bad)}. They are not saved; {self._saved()}. "
                f"{RETRY}"
            )

    def _images(self, step: int) -> list[int]:
        """Indices of the first images in the global batch of a step, counted from 1."""
        global_batch = self._run.training.batch_size * self._run.processes.count
        return first_images(self._run.training.seed, step - 1, len(self._run.source), global_batch, LISTED_IMAGES)

    def _diagnosis(self, count: int, loss: float) -> str:
        first = self._state.step - count + 1
        rate = self._run.training.rate_at(first - 1, self._last_step)
        precision = self._run.machine.precision
        return (
            f"the last {count} steps had no finite gradient and were skipped (--max_bad_steps "
            f"{self._run.training.max_bad_steps}). The first was step {first}: learning rate {rate:.4g}, loss {loss:.4g}, "
            f"precision {precision}, images {_listed(self._images(first))}; {self._saved()}. {RETRY}. "
            "To check the data, see the images of skipped steps in "
            'metrics.jsonl (kind "skipped")'
        )

    def _saved(self) -> str:
        there = (self._run.folder / CONTENT).exists()
        return f"{CONTENT} was saved before them" if there else f"no {CONTENT} was saved before them"


def _bad_parameters(network: nn.Module) -> list[str]:
    """Names of the parameters with NaN or infinity in this process's shard."""
    return [name for name, value in network.named_parameters() if count_bad(local_shard(value.detach()))]


def _listed(images: list[int]) -> str:
    return ", ".join(map(str, images)) + (", ..." if len(images) == LISTED_IMAGES else "")
