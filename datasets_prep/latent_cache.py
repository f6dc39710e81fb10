"""The latent cache: the posterior moments of all images, encoded once and stored in memory-mapped float16 shards.

A folder holds:
    manifest.json      the dataset, the autoencoder, and each file's CRC-32
    labels.npy         the images' labels (in labels_<CRC-32>.npy if they have changed)
    moments_00000.npy  and further shards, of shape [n, orientations, 2 c, h, w]

Orientation 0 is the image. Orientation 1 is its mirror image, which only datasets with `flips` need. Both are encoded,
because encode(flip(x)) differs from flip(encode(x)). A cache with mirror images also serves a dataset without `flips`.

The cache can also hold an image encoder's features, [n, orientations, d, rows, columns].

An interrupted build resumes. Images are encoded in the machine's precision, which the manifest records. A cache encoded in
another precision is accepted.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from datasets_prep.cached_moments import (
    LatentCache,
    as_bad_manifest,
    check_files,
    finish_cache,
    has_mirror_images,
    is_finished,
    read_labels,
    save_shard,
    shard_path,
    update_labels,
)
from datasets_prep.image_dataset import ImageDataset
from datasets_prep.images import MOST_READERS
from models.autoencoders.protocol import Encoder
from options import UsageError, option
from runtime.distributed import Processes
from runtime.files import read_json, write_json
from runtime.locks import locked
from runtime.outputs import warn_of_space
from runtime.precision import Machine
from runtime.progress import progress_bar

__all__ = [
    "FORMAT",
    "LOCK",
    "LatentCacheOptions",
    "build_latent_cache",
    "cache_folder",
    "open_latent_cache",
    "open_standalone_cache",
]

FORMAT = "latent-cache-2"
LOCK = "build.lock"
SHARD_BYTES = 1 << 26
PIXELS_PER_BATCH = 1 << 20  # 16 images of 256 x 256; one batch is read while another is encoded


@dataclass(frozen=True)
class LatentCacheOptions:
    """Latent cache."""

    no_latent_cache: bool = option(False, "encode images at every step instead of caching their latents")
    latent_cache_dir: str = option(
        "", "folder of the latent caches; default: latent_cache below --datadir", on_resume="freely"
    )
    num_workers: int = option(0, "threads that read image files", minimum=0, maximum=MOST_READERS, on_resume="freely")


def cache_folder(root: Path, dataset: ImageDataset, autoencoder: Encoder) -> Path:
    """The folder below `root` for one dataset, size, split and autoencoder."""
    facts = dataset.facts
    return root / f"{facts.name}_{facts.image_size}_{dataset.split}_{_hash_of(autoencoder)[:8]}"


def open_latent_cache(folder: Path, dataset: ImageDataset, autoencoder: Encoder) -> LatentCache:
    """Open a finished cache after checking its identity and its checksums.

    Raises:
        UsageError: the cache is for another dataset, size or autoencoder (the message contains both values), is unfinished,
            or has a damaged file.
    """
    manifest = read_json(folder / "manifest.json")
    _check_fits(folder, manifest, _identity(folder, dataset, autoencoder))
    with as_bad_manifest(folder):
        check_files(folder, manifest)
        return LatentCache(folder, manifest, dataset.labels)


def open_standalone_cache(folder: Path) -> tuple[LatentCache, dict[str, Any]]:
    """Open a finished cache without its images.

    Returns:
        The cache and its manifest.

    Raises:
        UsageError: the cache has an older format, is unfinished, or has a damaged file.
    """
    manifest = read_json(folder / "manifest.json")
    _check_fits(folder, manifest, {"format": FORMAT})
    with as_bad_manifest(folder):
        check_files(folder, manifest)
        return LatentCache(folder, manifest, torch.from_numpy(read_labels(folder, manifest))), manifest


def build_latent_cache(
    folder: Path,
    dataset: ImageDataset,
    autoencoder: Encoder,
    machine: Machine,
    processes: Processes = Processes(),  # noqa: B008
    num_workers: int = 0,
) -> None:
    """Encode the images that are missing in `folder`. The processes share the shards.

    A finished cache is not changed, except for labels that have changed in the dataset. If another run is building the cache,
    this one waits for it.

    Raises:
        UsageError: the folder holds another cache.
    """
    identity = _identity(folder, dataset, autoencoder)
    if not processes.any(not _is_finished(folder, identity)):
        if processes.is_main:
            update_labels(folder, dataset.stored_labels)
        return
    lock = locked(folder / LOCK, "is building this latent cache", wait=True) if processes.is_main else nullcontext()
    with lock:
        processes.barrier()
        if processes.any(not _is_finished(folder, identity)):  # another run may have finished it meanwhile
            _build(folder, identity, dataset, autoencoder, machine, processes, num_workers)


def _is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    if not (folder / "manifest.json").exists():
        return False
    _check_fits(folder, read_json(folder / "manifest.json"), identity)
    return is_finished(folder)


def _build(
    folder: Path,
    identity: dict[str, Any],
    dataset: ImageDataset,
    autoencoder: Encoder,
    machine: Machine,
    processes: Processes,
    num_workers: int,
) -> None:
    """Write the missing shards, then the labels and the manifest."""
    if processes.is_main and not (folder / "manifest.json").exists():
        write_json(folder / "manifest.json", identity)
        moments = len(dataset) * identity["orientations"] * int(np.prod(identity["moment_shape"]))
        warn_of_space(folder, 2 * moments, "the latent cache")
    processes.barrier()
    starts = range(0, len(dataset), identity["shard_size"])
    with progress_bar(total=len(dataset) // processes.count, desc="encoding latents", unit="image") as progress:
        for number in processes.share(range(len(starts))):
            path = shard_path(folder, number)
            entry_file = path.with_suffix(".json")
            images = range(starts[number], min(starts[number] + identity["shard_size"], len(dataset)))
            if not entry_file.exists():
                orientations = identity["orientations"]
                _write_shard(
                    path, entry_file, dataset, images, orientations, autoencoder, machine, progress, num_workers
                )
            else:
                progress.update(len(images))
    processes.barrier()
    if processes.is_main:
        finish_cache(folder, identity, len(starts), dataset.stored_labels)
    processes.barrier()


def _write_shard(
    path: Path,
    entry_file: Path,
    dataset: ImageDataset,
    images: range,
    orientations: int,
    autoencoder: Encoder,
    machine: Machine,
    progress: tqdm,
    num_workers: int,
) -> None:
    side = dataset.facts.image_size // autoencoder.factor
    moments = np.empty((len(images), orientations, autoencoder.moment_channels, side, side), np.float16)
    row = 0
    with closing(_read_ahead(dataset, images, num_workers)) as batches:
        for batch in batches:
            batch = batch.to(machine.device)
            for orientation in range(orientations):
                with machine.autocast():
                    encoded = autoencoder.encode(batch.flip(3) if orientation else batch).cpu()
                moments[row : row + len(batch), orientation] = encoded.half().numpy()
            row += len(batch)
            progress.update(len(batch))
    if not np.isfinite(moments).all():
        raise UsageError(
            f"the autoencoder {autoencoder.describe().id} gives values that float16 cannot hold for some of the images "
            f"{images.start} to {images.stop - 1} (in {machine.precision}): try --precision fp32 or --no_latent_cache"
        )
    save_shard(path, moments, machine.precision)


def _read_ahead(dataset: ImageDataset, images: range, num_workers: int) -> Generator[torch.Tensor, None, None]:
    """Yield batches uint8 [B, C, H, W] of `images`. While the caller uses one, threads read the next."""
    size = max(1, PIXELS_PER_BATCH // dataset.facts.image_size**2)
    batches = [images[first : first + size] for first in range(0, len(images), size)]
    with ThreadPoolExecutor(max(1, num_workers)) as readers:
        upcoming = readers.map(dataset.__getitem__, batches[0])
        for following in [*batches[1:], range(0)]:
            batch = torch.stack(list(upcoming))
            upcoming = readers.map(dataset.__getitem__, following)
            yield batch


def _identity(folder: Path, dataset: ImageDataset, autoencoder: Encoder) -> dict[str, Any]:
    facts = dataset.facts
    side = facts.image_size // autoencoder.factor
    if not side:
        raise UsageError(
            f"--image_size {facts.image_size} is too small: this autoencoder makes one latent of "
            f"{autoencoder.factor} x {autoencoder.factor} pixels"
        )
    shape = (autoencoder.moment_channels, side, side)
    orientations = 2 if facts.flips or has_mirror_images(folder) else 1
    return {
        "format": FORMAT,
        "dataset": facts.name,
        "split": dataset.split,
        "dataset_fingerprint": dataset.fingerprint,
        "count": len(dataset),
        "image_size": facts.image_size,
        "autoencoder_sha256": _hash_of(autoencoder),
        "orientations": orientations,
        "moment_shape": list(shape),
        "shard_size": max(1, SHARD_BYTES // (orientations * int(np.prod(shape)) * 2)),
    }


def _hash_of(autoencoder: Encoder) -> str:
    """The hash that identifies a cache's autoencoder.

    Raises:
        UsageError: the autoencoder has no hash.
    """
    facts = autoencoder.describe()
    if facts.sha256 is None:
        raise UsageError(
            f"the autoencoder {facts.id} has no hash, which a latent cache needs to identify it: pass --no_latent_cache"
        )
    return facts.sha256


def _check_fits(folder: Path, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    for key, expected in identity.items():
        if manifest.get(key) != expected:
            raise UsageError(
                f"the latent cache {folder} was built for another {key}: expected {expected}, but found "
                f"{manifest.get(key)}. Choose another folder with --latent_cache_dir, or delete this one"
            )
