"""The batches of training: functions of (seed, step, global sample index) alone.

The draws of a step are made for the global batch, and each process takes its slice. So N processes see what one would, and a
resumed run sees what an uninterrupted one would, without any random state to save.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from datasets_prep.conditions import ConditionSource
from datasets_prep.moments import MomentSource
from flow.objectives import Draws, Objective
from models.autoencoders.protocol import Autoencoder
from models.conditions import Condition, drop_labels
from options import UsageError
from runtime.distributed import Processes
from runtime.randomness import generator_for

__all__ = ["Batch", "StepStreams", "batches", "epoch_indices", "first_images", "steps_per_epoch"]

T = TypeVar("T")
Columns = TypeVar("Columns", bound=tuple)


class Batch(NamedTuple):
    """One process's share of a step: data and noise [B, c, h, w], the objective's draws [B], and the condition.

    In the condition, dropped labels are the null class and dropped maps are zero.
    """

    data: torch.Tensor
    noise: torch.Tensor
    draws: Draws
    condition: Condition

    def split(self, count: int) -> "list[Batch]":
        """The batch in `count` equal parts.

        Raises:
            ValueError: `count` does not divide the batch.
        """
        size, remainder = divmod(len(self.data), count)
        if remainder:
            raise ValueError(f"a batch of {len(self.data)} cannot be cut into {count} equal parts")
        parts = [slice(first, first + size) for first in range(0, len(self.data), size)]
        return [Batch(self.data[p], self.noise[p], _rows(self.draws, p), _rows(self.condition, p)) for p in parts]


def _rows(columns: Columns, part: slice) -> Columns:
    """Some rows of a named tuple of tensors or None."""
    rows: Any = (None if column is None else column[part] for column in columns)
    return type(columns)(*rows)


class StepStreams:
    """The random streams of one step, for the global batch.

    The purposes that the first version had ("time", "dropout", "posterior", "noise", "condition") share one generator and are
    drawn in this order, so that its runs resume exactly. Every other purpose has a generator of its own, named after it: a new
    draw changes no other.

    Args:
        seed: the run's.
        step: number of the step, from 0.
        count: N, samples in the global batch.
        shape: (c, h, w) of the latents.
        device: where the numbers are drawn.
    """

    def __init__(self, seed: int, step: int, count: int, shape: Sequence[int], device: torch.device) -> None:
        self._keys = seed, step
        self._shape = count, *shape
        self._device = device
        self._first = generator_for(seed, "step", step, device=device)
        time, dropout = torch.rand(2, count, generator=self._first, device=device)
        self._uniform = {"time": time, "dropout": dropout}
        self._normal = {purpose: self._randn(self._first) for purpose in ("posterior", "noise")}

    def uniform(self, purpose: str) -> torch.Tensor:
        """Numbers [N] in [0, 1)."""
        if purpose not in self._uniform:
            generator = self._own_generator("uniform", purpose)
            self._uniform[purpose] = torch.rand(self._shape[0], generator=generator, device=self._device)
        return self._uniform[purpose]

    def normal(self, purpose: str) -> torch.Tensor:
        """Standard normal numbers [N, c, h, w]."""
        if purpose not in self._normal:
            own = purpose != "condition"
            self._normal[purpose] = self._randn(self._own_generator("normal", purpose) if own else self._first)
        return self._normal[purpose]

    def _own_generator(self, kind: str, purpose: str) -> torch.Generator:
        seed, step = self._keys
        return generator_for(seed, "step", step, kind, purpose, device=self._device)

    def _randn(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(self._shape, generator=generator, device=self._device)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in `count` images; the rest of an epoch is left out, as published.

    Raises:
        UsageError: not even one batch.
    """
    if count < batch_size:
        raise UsageError(f"the dataset has {count} images, fewer than one batch of {batch_size}: lower --batch_size")
    return count // batch_size


def epoch_indices(seed: int, epoch: int, count: int) -> torch.Tensor:
    """The permutation [count] in which an epoch visits the images."""
    return torch.randperm(count, generator=generator_for(seed, "order", epoch))


def first_images(seed: int, step: int, count: int, batch_size: int, wanted: int) -> list[int]:
    """The first `wanted` of the images, by index, that the whole batch of a step is made of."""
    chosen, _ = _order(seed, count, batch_size, slice(wanted), flips=False)(step)
    return chosen.tolist()


def batches(
    source: MomentSource,
    autoencoder: Autoencoder,
    objective: Objective,
    *,
    batch_size: int,
    first_step: int,
    last_step: int,
    seed: int,
    flips: bool,
    num_classes: int,
    label_dropout: float,
    device: torch.device,
    processes: Processes,
    condition: ConditionSource | None = None,
    condition_dropout: float = 0.0,
) -> Iterator[Batch]:
    """The batches of steps first_step .. last_step - 1; what they are made of is read one step ahead in a thread.

    Args:
        source: posterior moments by image index.
        autoencoder: samples the posterior and scales the latents.
        objective: draws its times from the step's random streams.
        batch_size: images per process.
        first_step: the step to (re)start at.
        last_step: the step to stop before.
        seed: of all draws.
        flips: whether each image is mirrored half of the time.
        num_classes: K, also the null class's id.
        label_dropout: probability of the null class.
        device: where the batch lives.
        processes: this process takes slice `rank` of every global batch.
        condition: dense conditions by image index, whose random parts are numbered by step and place in the whole batch.
        condition_dropout: probability of a dense map of zeros.
    """
    whole = batch_size * processes.count
    share = slice(processes.rank * batch_size, (processes.rank + 1) * batch_size)
    choose = _order(seed, len(source), whole, share, flips)

    pin = device.type != "cpu"  # so that no copy to the device holds up the host

    def request(step: int) -> Callable[[], _Read]:
        draws = range(step * whole + share.start, step * whole + share.stop)
        return partial(_read, source, condition, *choose(step), draws, pin)

    for step, (moments, labels, raw) in _one_ahead(request, first_step, last_step):
        moments, labels = moments.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        streams = StepStreams(seed, step, whole, (autoencoder.latent_channels, *moments.shape[2:]), device)
        dropout = streams.uniform("dropout")[share]  # of labels and map alike, so that guidance leads away from both
        dense = None
        if condition is not None and raw is not None:
            dense = condition.encode(raw, streams.normal("condition")[share])
            dense = dense * (dropout >= condition_dropout).view(-1, 1, 1, 1)
        yield Batch(
            data=autoencoder.sample(moments, streams.normal("posterior")[share]),
            noise=streams.normal("noise")[share],
            draws=_rows(objective.draw(streams), share),
            condition=Condition(drop_labels(labels, dropout, label_dropout, num_classes), dense),
        )


class _Read(NamedTuple):
    """What was read of a process's share: moments, labels [B], and the condition before it is encoded."""

    moments: torch.Tensor
    labels: torch.Tensor
    raw: torch.Tensor | None


def _read(
    source: MomentSource,
    condition: ConditionSource | None,
    chosen: torch.Tensor,
    mirrored: torch.Tensor,
    draws: Sequence[int],
    pin: bool,
) -> _Read:
    raw = None if condition is None else condition.read(chosen, mirrored, draws)
    moments, labels = source.moments(chosen, mirrored), source.labels[chosen]
    read = _Read(moments, labels, raw)
    if not pin:
        return read
    return _Read(*(x if x is None or x.device.type != "cpu" else x.pin_memory() for x in read))  # type: ignore[arg-type]


Choose = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def _order(seed: int, count: int, whole: int, share: slice, flips: bool) -> Choose:
    """A function from a step to the images in this process's `share` of its `whole` batch, and which are mirrored."""
    per_epoch = steps_per_epoch(count, whole)
    order_of: dict[int, torch.Tensor] = {}

    def choose(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, position = divmod(step, per_epoch)
        if epoch not in order_of:
            order_of.clear()
            order_of[epoch] = epoch_indices(seed, epoch, count)
        chosen = order_of[epoch][position * whole : (position + 1) * whole]
        mirrored = torch.rand(whole, generator=generator_for(seed, "flip", step)) < (0.5 if flips else 0)
        return chosen[share], mirrored[share]

    return choose


def _one_ahead(request: Callable[[int], Callable[[], T]], first: int, last: int) -> Iterator[tuple[int, T]]:
    """Steps first .. last - 1 with the result of `request(step)()`, had in a thread while the step before is computed.

    From a cache the thread does nothing but read. torch's parallel loops in it give it OpenMP threads of its own, and once
    there are more of these than processors, all of them go to sleep at the end of every loop, in the training step too. Images
    that are encoded at every step pay for that.
    """
    with ThreadPoolExecutor(1) as thread:
        upcoming: deque[Future[T]] = deque()
        for step in range(first, last):
            for ahead in range(step + len(upcoming), min(step + 2, last)):
                upcoming.append(thread.submit(request(ahead)))
            yield step, upcoming.popleft().result()
