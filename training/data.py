"""What one optimizer step sees, as a function of (seed, step, global sample index) alone.

The draws of a step are made for the whole batch of all processes, and each process takes its slice; so N processes see
what one would, and a resumed run sees what an uninterrupted one would, without any random state to save.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from datasets_prep.moments import MomentSource
from flow.paths import PathOptions
from flow.times import training_times
from models.autoencoder import Autoencoder, PixelSpace
from models.conditions import drop_labels
from options import UsageError
from runtime.distributed import Processes
from runtime.randomness import generator_for

__all__ = ["Batch", "batches", "epoch_indices", "steps_per_epoch"]


class Batch(NamedTuple):
    """One process's share of a step: data and noise [B, c, h, w], times [B], labels [B] with the dropped ones null."""

    data: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor

    def split(self, count: int) -> "list[Batch]":
        """The batch in `count` equal parts.

        Raises:
            ValueError: it cannot be cut so.
        """
        if len(self.t) % count:
            raise ValueError(f"a batch of {len(self.t)} cannot be cut into {count} equal parts")
        return [Batch(*parts) for parts in zip(*(tensor.chunk(count) for tensor in self), strict=True)]


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


def batches(
    source: MomentSource,
    autoencoder: Autoencoder | PixelSpace,
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
) -> Iterator[Batch]:
    """The batches of steps first_step .. last_step - 1; moments are fetched one step ahead in a thread.

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
    """
    whole = batch_size * processes.count
    share = slice(processes.rank * batch_size, (processes.rank + 1) * batch_size)
    choose = _order(seed, len(source), whole, share, flips)
    for step, moments, labels in _one_ahead(source, choose, first_step, last_step):
        moments, labels = moments.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        generator = generator_for(seed, "step", step, device=device)
        uniform, dropout = torch.rand(2, whole, generator=generator, device=device)
        shape = (whole, autoencoder.latent_channels, *moments.shape[2:])
        posterior, noise = (torch.randn(shape, generator=generator, device=device)[share] for _ in range(2))
        yield Batch(
            data=autoencoder.sample(moments, posterior),
            noise=noise,
            t=training_times(uniform, path)[share],
            labels=drop_labels(labels, dropout[share], label_dropout, num_classes),
        )


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


def _one_ahead(
    source: MomentSource, choose: Choose, first: int, last: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Steps first .. last - 1 with their moments and labels, read in a thread while the step before is computed.

    The thread does nothing but read. torch's parallel loops in it would give it OpenMP threads of its own, and once there are
    more of these than processors, all of them go to sleep at the end of every loop, in the training step too.
    """
    with ThreadPoolExecutor(1) as thread:
        upcoming: deque[tuple[Future[torch.Tensor], torch.Tensor]] = deque()
        for step in range(first, last):
            for ahead in range(step + len(upcoming), min(step + 2, last)):
                chosen, mirrored = choose(ahead)
                upcoming.append((thread.submit(source.moments, chosen, mirrored), source.labels[chosen]))
            moments, labels = upcoming.popleft()
            yield step, moments.result(), labels
