"""Mean and covariance of features over many images: streamed in float64, stored, cached.

Batches are merged by the shifted update of Chan, Golub & LeVeque (1979): with d the difference of the means of n and m
rows, the scatter matrices add up to S = S_n + S_m + d d^T n m / (n + m), which never subtracts large numbers.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from datasets_prep.datasets import ImageDataset, crop_padding
from datasets_prep.images import IMAGE_SUFFIXES, read_image
from evaluation.features import FeatureNetwork
from options import UsageError, as_json
from runtime.distributed import Processes
from runtime.files import atomic_path
from runtime.progress import progress_bar
from runtime.unpickling import UNPICKLING_ERRORS, load_numpy_pickle

__all__ = [
    "RunningMoments",
    "Statistics",
    "compute_statistics",
    "dataset_statistics",
    "describe_features",
    "folder_statistics",
    "image_batches",
    "load_statistics",
    "read_statistics",
    "save_statistics",
]


# What numpy, zipfile and json raise for one thing: a damaged file.
UNREADABLE = (OSError, *UNPICKLING_ERRORS, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Statistics:
    """Mean float64 [D] and unbiased covariance float64 [D, D] of `count` images' features (None: not recorded)."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None
    meta: dict[str, Any] = field(default_factory=dict)


class RunningMoments:
    """Mean and covariance of rows that come in batches, in float64 on the CPU."""

    def __init__(self, dims: int) -> None:
        self.count = 0
        self._mean = torch.zeros(dims, dtype=torch.float64)
        self._scatter = torch.zeros(dims, dims, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        """Add rows [B, dims]."""
        if len(features):
            rows = features.detach().to("cpu", torch.float64)
            mean = rows.mean(0)
            centred = rows - mean
            self._add(len(rows), mean, centred.T @ centred)

    def merge(self, other: "RunningMoments") -> None:
        """Add all rows that `other` has seen."""
        if other.count:
            self._add(other.count, other._mean, other._scatter)

    def of_all(self, processes: Processes) -> "RunningMoments":
        """The moments of the rows of all processes, in each of them."""
        merged = RunningMoments(len(self._mean))
        for part in processes.gather(self):
            merged.merge(part)
        return processes.from_main(merged)

    @property
    def mean(self) -> np.ndarray:
        """Mean float64 [dims]."""
        return self._mean.numpy().copy()

    @property
    def covariance(self) -> np.ndarray:
        """Covariance float64 [dims, dims], divided by count - 1.

        Raises:
            UsageError: fewer than two rows.
        """
        if self.count < 2:
            raise UsageError(f"a covariance needs at least two images, but there is {self.count}")
        return (self._scatter / (self.count - 1)).numpy()

    def statistics(self, meta: dict[str, Any] | None = None) -> Statistics:
        """The moments so far, with a description of where they come from (JSON's types)."""
        return Statistics(self.mean, self.covariance, self.count, meta or {})

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total = self.count + count
        shift = mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total


def compute_statistics(
    batches: Iterable[torch.Tensor], features: FeatureNetwork, meta: dict[str, Any] | None = None
) -> Statistics:
    """Statistics of batches of images uint8 [B, C, H, W], which are consumed one at a time."""
    moments = RunningMoments(features.dims)
    for images in batches:
        moments.update(features(images))
    return moments.statistics({**(meta or {}), "features": describe_features(features)})


def describe_features(features: FeatureNetwork) -> dict[str, str]:
    """What a result must say about the network behind it."""
    return {"name": features.name, "label": features.label, "sha256": features.sha256}


def image_batches(
    dataset: ImageDataset,
    batch_size: int,
    processes: Processes = Processes(),  # noqa: B008
) -> Iterator[torch.Tensor]:
    """All images of a split in order, uint8 [B, C, H, W], padding included, with a progress bar.

    Of several processes, each gets its share of the batches.
    """
    description = f"{dataset.facts.name} {dataset.split}"
    with progress_bar(total=len(dataset) // processes.count, desc=description, unit="image") as progress:
        for start in processes.share(range(0, len(dataset), batch_size)):
            images = torch.stack([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
            yield images
            progress.update(len(images))


def dataset_statistics(
    dataset: ImageDataset,
    features: FeatureNetwork,
    cache_dir: str | Path | None,
    batch_size: int = 200,
    processes: Processes = Processes(),  # noqa: B008
) -> Statistics:
    """Statistics of all images of a split, without their padding; kept in `cache_dir` unless that is None.

    Several processes share the images, and all get the result.

    Raises:
        UsageError: a cached file that cannot be read.
    """
    facts = dataset.facts
    source = {"dataset": facts.name, "split": dataset.split, "image_size": facts.image_size}
    meta = {**source, "fingerprint": dataset.fingerprint, "features": describe_features(features)}
    key = hashlib.sha256(f"{features.sha256} {dataset.fingerprint}".encode()).hexdigest()[:8]
    name = f"{facts.name}_{dataset.split}_{facts.image_size}_{features.name}_{key}.npz"
    path = None if cache_dir is None else Path(cache_dir) / name
    known = load_statistics(path) if path and path.exists() else None
    known = known if known and known.meta == meta else None
    missing = processes.any(known is None)  # for one is missing for all: they compute it together
    if known is not None and not missing:
        return known

    moments = RunningMoments(features.dims)
    for images in image_batches(dataset, batch_size, processes):
        moments.update(features(crop_padding(images, facts)))
    statistics = moments.of_all(processes).statistics(meta)
    if path and processes.is_main:
        try:
            save_statistics(path, statistics)
        except OSError as error:  # a read-only data directory is no reason to fail
            print(f"note: the statistics are not kept: {error}")
    return statistics


def folder_statistics(folder: str | Path, features: FeatureNetwork, batch_size: int) -> Statistics:
    """Statistics of all image files below `folder`, each in its own size (the central square of oblong ones).

    Raises:
        UsageError: no images, or one that cannot be read.
    """
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise UsageError(f"no images in {folder}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return compute_statistics(_read_batches(paths, batch_size), features, {"folder": str(folder)})


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write an .npz with the arrays `mu` and `sigma` and, as JSON, `metadata`; whole or not at all."""
    metadata = json.dumps(as_json({"count": statistics.count, **statistics.meta}))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=statistics.mean, sigma=statistics.covariance, metadata=np.array(metadata))


def load_statistics(path: str | Path) -> Statistics:
    """Statistics of an .npz with `mu` and `sigma`, ours or pytorch-fid's, or of a published .npy (a pickled dict).

    Raises:
        UsageError: the file is missing, damaged, or holds something else; nothing but arrays is ever unpickled.
    """
    try:
        with Path(path).open("rb") as file:
            content = _read_npy(file) if Path(path).suffix == ".npy" else dict(np.load(file, allow_pickle=False))
        mean, covariance = (np.asarray(content[key], dtype=np.float64) for key in ("mu", "sigma"))
        meta = json.loads(str(content.get("metadata", "{}")))
    except UNREADABLE as error:
        raise UsageError(f"cannot read statistics (arrays mu and sigma) from {path}: {error}") from error
    if mean.ndim != 1 or covariance.shape != mean.shape * 2 or not np.isfinite(covariance).all():
        raise UsageError(
            f"{path}: expected finite mu [D] and sigma [D, D], but found {mean.shape} and {covariance.shape}"
        )
    return Statistics(mean, covariance, meta.pop("count", None), meta)


def read_statistics(path: str | Path, features: FeatureNetwork, batch_size: int) -> Statistics:
    """Statistics of a folder of images, or of a statistics file; errors as `folder_statistics` and `load_statistics`."""
    return folder_statistics(path, features, batch_size) if Path(path).is_dir() else load_statistics(path)


def _read_batches(paths: list[Path], batch_size: int) -> Iterator[torch.Tensor]:
    """Batches of equally large images; Inception resizes, so a folder may mix sizes."""
    batch: list[torch.Tensor] = []
    for path in progress_bar(paths, desc=paths[0].parent.name, unit="image"):
        try:
            with Image.open(path) as file:
                side = min(file.size)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"cannot read the image {path}: {error}") from error
        image = read_image(path, side)
        if batch and (len(batch) == batch_size or batch[0].shape != image.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    yield torch.stack(batch)


def _read_npy(file: BinaryIO) -> dict[str, Any]:
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("a .npy of an unknown version")
    _, _, dtype = np.lib.format.read_array_header_1_0(file)
    if not dtype.hasobject:
        raise ValueError("a plain array")
    content = load_numpy_pickle(file)
    value = content.item() if isinstance(content, np.ndarray) and content.size == 1 else content
    if not isinstance(value, dict):
        raise ValueError(f"a pickled {type(value).__name__}")
    return value
