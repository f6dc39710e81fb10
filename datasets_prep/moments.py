"""Posterior moments for training: from the latent cache, from precomputed latents, or encoded from images at every step."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from datasets_prep.cached_moments import LatentCache, has_mirror_images, is_finished
from datasets_prep.datasets import DatasetOptions, ImageDataset
from datasets_prep.latent_cache import LatentCacheOptions, build_latent_cache, cache_folder, open_latent_cache
from datasets_prep.latents import LatentDataset, StoredMoments
from flow.losses.contrast import means_of_others
from models.autoencoders.protocol import MEASURED, UNMEASURED, Autoencoder, Encoder
from models.autoencoders.statistics import LatentStatistics, describe_scale, measure_statistics
from options import UsageError
from runtime.distributed import Processes
from runtime.messages import fact, note
from runtime.outputs import write_error
from runtime.precision import Machine

__all__ = ["MomentSource", "choose_cache_folder", "mean_latents", "measure_scale", "open_encoded", "open_moments"]

IMAGES_OF_MEANS = 10_000  # the error of a mean is then 1 % of a standard deviation
IMAGES_PER_READ = 250


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
    spare: Path | None = None,
) -> MomentSource:
    """Open the source of a dataset's posterior moments.

    Moments of images come from the latent cache, which is built if it is missing. It is below `spare` if the data folder is
    read-only. In pixel space or with --no_latent_cache, images are encoded on the fly. A dataset of latents is read directly.

    Raises:
        UsageError: the latent cache cannot be written, or belongs to other images.
    """
    if isinstance(dataset, LatentDataset):
        return StoredMoments(dataset, autoencoder)
    return open_encoded(dataset, autoencoder, data, cache, machine, processes, spare)


def open_encoded(
    dataset: ImageDataset,
    encoder: Encoder,
    data: DatasetOptions,
    cache: LatentCacheOptions,
    machine: Machine,
    processes: Processes = Processes(),  # noqa: B008
    spare: Path | None = None,
    subfolder: str = "",
) -> MomentSource:
    """Open a dataset's encoded images: from a cache, or encoded on the fly. Arguments as in `open_moments`.

    Caches of features have their own `subfolder`, so that they are not taken for latents.
    """
    if cache.no_latent_cache or encoder.is_pixel_space:
        return EncodedImages(dataset, encoder.encode, machine, cache.num_workers)
    folder = processes.from_main(
        choose_cache_folder(dataset, encoder, data, cache, spare, subfolder) if processes.is_main else Path()
    )
    build_latent_cache(folder, dataset, encoder, machine, processes, cache.num_workers)
    opened = open_latent_cache(folder, dataset, encoder)
    if opened.precision != machine.precision:
        note(f"the latent cache {folder} was encoded in {opened.precision}, but this run uses {machine.precision}")
    return opened


def choose_cache_folder(
    dataset: ImageDataset,
    autoencoder: Encoder,
    data: DatasetOptions,
    cache: LatentCacheOptions,
    spare: Path | None = None,
    subfolder: str = "",
) -> Path:
    """The folder of a latent cache, which exists already or can be written.

    Args:
        dataset: the images.
        autoencoder: encodes them.
        data: names the folder of the data, below which the cache lies by default.
        cache: may name another folder.
        spare: folder for the caches of read-only data folders.
        subfolder: name of a folder inside the folder of all caches.

    Raises:
        UsageError: neither that folder nor `spare` can be written.
    """
    root = Path(cache.latent_cache_dir or data.derived / "latent_cache") / subfolder
    folder = _with_orientations(cache_folder(root, dataset, autoencoder), dataset)
    if is_finished(folder) or (error := write_error(root)) is None:
        return folder
    if cache.latent_cache_dir or spare is None:
        raise UsageError(
            f"cannot write the latent cache in {root} ({error}): name another folder with --latent_cache_dir, or pass "
            "--no_latent_cache"
        )
    # Folders of different data may have the same name.
    other = spare / hashlib.sha256(str(data.derived.resolve()).encode(errors="surrogateescape")).hexdigest()[:8]
    if dataset.split == "train":
        note(f"cannot write into {data.derived} ({error}), so the latent cache is in {other} (see --latent_cache_dir)")
    return _with_orientations(cache_folder(other / subfolder, dataset, autoencoder), dataset)


def _with_orientations(folder: Path, dataset: ImageDataset) -> Path:
    """`folder`, or another one if that holds a cache without the mirror images that the dataset needs."""
    lacking = dataset.facts.flips and has_mirror_images(folder) is False
    return folder.with_name(f"{folder.name}_mirrored") if lacking else folder


def mean_latents(
    source: MomentSource, autoencoder: Autoencoder, classes: int, flips: bool, device: torch.device
) -> torch.Tensor:
    """The mean latents of the classes other than each class, or of all; see `means_of_others`.

    At most IMAGES_OF_MEANS evenly spaced images count. If `flips`, every other one is mirrored.
    """
    parts = ((autoencoder.sample(moments.to(device)), labels) for moments, labels in _spread(source, flips))
    return means_of_others(parts, classes)


def measure_scale(
    source: MomentSource,
    autoencoder: Autoencoder,
    flips: bool,
    processes: Processes = Processes(),  # noqa: B008
) -> None:
    """Scale the autoencoder's latents by their statistics over `source`, unless their scale is known.

    At most IMAGES_OF_MEANS evenly spaced images count. If `flips`, every other one is mirrored. A latent cache keeps the
    statistics, so they are measured once. All processes must call this.
    """
    if (facts := autoencoder.describe()).statistics != UNMEASURED:
        return
    found = processes.from_main(
        _statistics(source, autoencoder, flips) if processes.is_main else LatentStatistics((), ())
    )
    mean, std = found.mean, found.std
    autoencoder.restore_scale(replace(facts, latents_mean=mean, latents_std=std, statistics=MEASURED))
    fact("latents", f"measured {describe_scale(mean, std)} of the channels")


def _statistics(source: MomentSource, autoencoder: Autoencoder, flips: bool) -> LatentStatistics:
    cache = source if isinstance(source, LatentCache) else None
    stored = cache.statistics() if cache else None
    measured = stored or measure_statistics(
        (moments for moments, _ in _spread(source, flips)), autoencoder.has_posterior
    )
    if not all(std > 0 for std in measured.std):
        raise UsageError(
            f"the latents of the autoencoder {autoencoder.describe().id} have a constant channel, so they cannot be scaled by "
            "their measured deviation: pass --scale_factor or --latent_statistics FILE"
        )
    if cache and not stored:
        cache.keep_statistics(measured)
    return measured


def _spread(source: MomentSource, flips: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Moments and labels of at most IMAGES_OF_MEANS evenly spaced images; if `flips`, every other one is mirrored."""
    indices = torch.arange(0, len(source), -(-len(source) // IMAGES_OF_MEANS))
    mirrored = (torch.arange(len(indices)) % 2 == 1) & flips
    for rows in torch.arange(len(indices)).split(IMAGES_PER_READ):
        yield source.moments(indices[rows], mirrored[rows]), source.labels[indices[rows]]
