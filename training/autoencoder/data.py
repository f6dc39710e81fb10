"""Batches of pixels as functions of (seed, step, index in the global batch)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from datasets_prep.datasets import DatasetFacts, ImageDataset
from models.autoencoders.pixels import images_to_pixels
from options import UsageError
from runtime.distributed import Processes
from runtime.randomness import StepDraws
from training.autoencoder.augmentation import augment
from training.reading.ahead import read_ahead
from training.reading.order import image_order

__all__ = ["PixelBatch", "RememberedImages", "choose_channels", "padding", "pixel_batches"]

REMEMBERED_BYTES = 1 << 30  # of decoded images in each process; larger datasets are read again in every epoch


class PixelBatch(NamedTuple):
    """One process's batch of a step: pixels [B, C, H, W] in [-1, 1], and the step's random numbers."""

    pixels: torch.Tensor
    draws: StepDraws


class RememberedImages:
    """A dataset's images uint8 [C, H, W] by index. The first REMEMBERED_BYTES of those that were read stay in memory."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.facts = dataset.facts
        self._dataset = dataset
        self._kept: dict[int, torch.Tensor] = {}
        self._room = REMEMBERED_BYTES

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self._kept:
            return self._kept[index]
        image = self._dataset[index]
        if self._room >= image.nbytes:
            self._room -= image.nbytes
            self._kept[index] = image
        return image


def choose_channels(facts: DatasetFacts, wanted: int | None) -> int:
    """The network's image channels.

    Raises:
        UsageError: `wanted` does not fit the images.
    """
    channels = wanted or facts.channels
    if channels not in (facts.channels, 3) or facts.channels not in (channels, 1):
        raise UsageError(
            f"--image_channels {channels} does not fit images with {facts.channels} channels: expected the same number, "
            "or 3 for gray images"
        )
    return channels


def padding(facts: DatasetFacts) -> int:
    """The width of the border in pixels that the dataset added around its images."""
    return 0 if facts.crop is None else (facts.image_size - facts.crop) // 2


def pixel_batches(
    images: RememberedImages,
    *,
    channels: int,
    augmentations: tuple[str, ...],
    batch_size: int,
    first_step: int,
    last_step: int,
    seed: int,
    device: torch.device,
    processes: Processes,
) -> Iterator[PixelBatch]:
    """Yield this process's batches of the steps first_step .. last_step - 1. A thread reads the images one step ahead.

    Every epoch has a new random order, and skips the images that do not fill a batch. Images are mirrored at random if mirror
    images belong to the dataset.

    Raises:
        UsageError: the dataset is smaller than the global batch.
    """
    count = batch_size * processes.count
    rows = slice(processes.rank * batch_size, (processes.rank + 1) * batch_size)
    names = (*augmentations, "flip") if images.facts.flips else augmentations
    choose = image_order(seed, len(images), count, flips=False)

    def reader(step: int) -> Callable[[], torch.Tensor]:
        return partial(_stack, images, choose(step)[0][rows].tolist())

    for step, read in read_ahead(reader, first_step, last_step, device):
        draws = StepDraws(seed, step, rows, count, device)
        pixels = images_to_pixels(read.to(device, non_blocking=True)).expand(-1, channels, -1, -1)
        pixels = augment(pixels, names, draws)
        yield PixelBatch(pixels.contiguous(memory_format=torch.channels_last), draws)


def _stack(images: RememberedImages, indices: list[int]) -> torch.Tensor:
    return torch.stack([images[index] for index in indices])
