"""Posterior moments for training: from the latent cache, from precomputed latents, or encoded from images at every step."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from datasets_prep.datasets import DatasetOptions, ImageDataset
from datasets_prep.latent_cache import LatentCacheOptions, build_latent_cache, cache_folder, open_latent_cache
from datasets_prep.latents import LatentDataset, StoredMoments
from models.autoencoders.protocol import Autoencoder
from runtime.distributed import Processes
from runtime.messages import note
from runtime.precision import Machine

__all__ = ["MomentSource", "open_moments"]


class MomentSource(Protocol):
    """Posterior moments of a dataset's images by index."""

    labels: torch.Tensor

    def __len__(self) -> int: ...

    def moments(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """Moments [B, 2 c, h, w] of images `indices` [B], or of their mirror images where `mirrored` [B]."""
        ...


class EncodedImages:
    """Posterior moments encoded at every call, in the machine's precision. `workers` threads read the images."""

    def __init__(
        self, dataset: ImageDataset, encode: Callable[[torch.Tensor], torch.Tensor], machine: Machine, workers: int
    ) -> None:
        self.labels = dataset.labels
        self._dataset = dataset
        self._encode = encode
        self._machine = machine
        self._readers = ThreadPoolExecutor(max(1, workers))

    def __len__(self) -> int:
        return len(self._dataset)

    def moments(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """Moments [B, 2 c, h, w] on the machine's device."""
        images = torch.stack(list(self._readers.map(self._dataset.__getitem__, indices.tolist())))
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        with self._machine.autocast():
            return self._encode(images.to(self._machine.device))


def open_moments(
    dataset: ImageDataset,
    autoencoder: Autoencoder,
    data: DatasetOptions,
    cache: LatentCacheOptions,
    machine: Machine,
    processes: Processes = Processes(),  # noqa: B008
) -> MomentSource:
    """Open the source of a dataset's posterior moments.

    Moments of images come from the latent cache, which is built if it is missing. In pixel space or with --no_latent_cache,
    images are encoded on the fly. A dataset of latents is read directly.
    """
    if isinstance(dataset, LatentDataset):
        return StoredMoments(dataset, autoencoder)
    if cache.no_latent_cache or autoencoder.is_pixel_space:
        return EncodedImages(dataset, autoencoder.encode, machine, cache.num_workers)
    root = Path(cache.latent_cache_dir or data.derived / "latent_cache")
    folder = cache_folder(root, dataset, autoencoder)
    build_latent_cache(folder, dataset, autoencoder, machine, processes, cache.num_workers)
    opened = open_latent_cache(folder, dataset, autoencoder)
    if opened.precision != machine.precision:
        note(f"the latent cache {folder} was encoded in {opened.precision}, but this run uses {machine.precision}")
    return opened
