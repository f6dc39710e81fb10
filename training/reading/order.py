"""The order of training images, a function of (seed, step): every epoch is a new permutation."""

from collections.abc import Callable

import torch

from options import UsageError
from runtime.randomness import generator_for

__all__ = ["epoch_indices", "first_images", "image_order", "steps_per_epoch"]

Choose = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Number of whole global batches in `count` images. As in LFM's published code, an epoch skips the remaining images.

    If the images do not fill one batch, an epoch is one batch that contains each of them once or more.

    Raises:
        UsageError: there are no images.
    """
    if count < 1:
        raise UsageError("the dataset has no images")
    return max(1, count // batch_size)


def epoch_indices(seed: int, epoch: int, count: int) -> torch.Tensor:
    """The random order of the images in an epoch, a permutation [count]."""
    return torch.randperm(count, generator=generator_for(seed, "order", epoch))


def first_images(seed: int, step: int, count: int, batch_size: int, wanted: int) -> list[int]:
    """Indices of the first `wanted` images in a step's global batch of `batch_size` images."""
    chosen, _ = image_order(seed, count, batch_size, flips=False)(step)
    return chosen[:wanted].tolist()


def image_order(seed: int, count: int, global_batch: int, flips: bool) -> Choose:
    """Return a function from a step to the images of its global batch, and whether each is mirrored."""
    per_epoch = steps_per_epoch(count, global_batch)
    order_of: dict[int, torch.Tensor] = {}

    def choose(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, position = divmod(step, per_epoch)
        if epoch not in order_of:
            order_of.clear()
            passes = -(-global_batch // count)  # 1, unless the images do not fill a batch
            parts = [epoch_indices(seed, passes * epoch + number, count) for number in range(passes)]
            order_of[epoch] = torch.cat(parts)
        chosen = order_of[epoch][position * global_batch : (position + 1) * global_batch]
        mirrored = torch.rand(global_batch, generator=generator_for(seed, "flip", step)) < (0.5 if flips else 0)
        return chosen, mirrored

    return choose
