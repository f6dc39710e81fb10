"""What one optimizer step sees, as a function of (seed, step, global sample index) alone.

The draws of a step are made for the whole batch of all processes, and each process takes its slice; so N processes see
what one would, and a resumed run sees what an uninterrupted one would, without any random state to save.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from datasets_prep.conditions import ConditionSource
from datasets_prep.moments import MomentSource
from flow.paths import PathOptions
from flow.times import training_times
from models.autoencoders.protocol import Autoencoder
from models.conditions import drop_labels
from options import UsageError
from runtime.distributed import Processes
from runtime.randomness import generator_for

__all__ = ["Batch", "batches", "epoch_indices", "first_images", "steps_per_epoch"]

T = TypeVar("T")


class Batch(NamedTuple):
    """One process's share of a step: data and noise [B, c, h, w], times [B], labels [B] and a dense map [B, K, h, w] or None.

    Dropped labels are null, a dropped map is zero.
    """

    data: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor
    dense: torch.Tensor | None = None

    def split(self, count: int) -> "list[Batch]":
        """The batch in `count` equal parts.

        Raises:
            ValueError: it cannot be cut so.
        """
        if len(self.t) % count:
            raise ValueError(f"a batch of {len(self.t)} cannot be cut into {count} equal parts")
        columns = [[None] * count if tensor is None else tensor.chunk(count) for tensor in self]
        return [Batch(*parts) for parts in zip(*columns, strict=True)]


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
    path: PathOptions,
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
        path: distribution of training times.
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
        generator = generator_for(seed, "step", step, device=device)
        uniform, dropout = torch.rand(2, whole, generator=generator, device=device)
        shape = (whole, autoencoder.latent_channels, *moments.shape[2:])
        posterior, noise = (torch.randn(shape, generator=generator, device=device)[share] for _ in range(2))
        dense = None
        if condition is not None and raw is not None:
            kept = dropout[share] >= condition_dropout  # the chance of the labels: guidance leads away from neither
            dense = condition.encode(raw, torch.randn(shape, generator=generator, device=device)[share])
            dense = dense * kept.view(-1, 1, 1, 1)
        yield Batch(
            data=autoencoder.sample(moments, posterior),
            noise=noise,
            t=training_times(uniform, path)[share],
            labels=drop_labels(labels, dropout[share], label_dropout, num_classes),
            dense=dense,
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
