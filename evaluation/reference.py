"""Summaries of whole image sets, usually of real images. A dataset's summary is cached in files."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.features.protocol import FeatureNetwork, describe_features
from evaluation.metrics import check_comparable
from evaluation.sources import ImageSource, holds_images, image_batches, open_source
from evaluation.statistics import Statistics, load_statistics, save_statistics
from evaluation.summary import Gatherer, Summary
from options import UsageError
from runtime.distributed import Processes
from runtime.files import UNREADABLE, atomic_path
from runtime.finite import describe_not_finite, finite_rows
from runtime.messages import note
from runtime.randomness import generator_for

__all__ = [
    "REFERENCE_ROWS",
    "StoredSet",
    "holds_statistics",
    "open_set",
    "statistics_summary",
    "summarise",
    "summarise_set",
]

# A reference keeps the features of a random subset of this size, the same number as in ADM's evaluation.
REFERENCE_ROWS = 10_000
SUMMARY_FIELDS = {"moments": "statistics", "spatial": "spatial", "rows": "rows", "logits": "logits"}


def summarise(
    source: ImageSource,
    features: FeatureNetwork,
    needs: Iterable[str],
    cache_dir: str | Path | None = None,
    batch_size: int = 200,
    processes: Processes = Processes(),  # noqa: B008
) -> Summary:
    """Summarize all images of a source.

    With "rows", the summary holds the features of a fixed random subset of REFERENCE_ROWS images.

    Args:
        source: the images.
        features: the feature network.
        needs: keys of evaluation.summary.NEEDS.
        cache_dir: folder of cached summaries, which are reused, and where new ones are written. None: no cache.
        batch_size: images per batch.
        processes: processes that share the images. All return the same summary.

    Raises:
        UsageError: the network lacks a needed output, or an image or a cached file cannot be read.
    """
    needs = list(needs)
    parts: list[Summary] = []
    missing = needs
    if cache_dir is not None and processes.is_main:
        found = {
            need: _read_part(_part_path(cache_dir, source, features, need), need, source, features) for need in needs
        }
        parts = [part for part in found.values() if part is not None]
        missing = [need for need, part in found.items() if part is None]
    missing = processes.from_main(missing)
    if missing:
        gatherer = Gatherer(features, missing, keep=_subset(source.count))
        for images, indices in image_batches(source, batch_size, processes):
            gatherer.update(images, indices)
        gatherer.merge_all(processes)
        parts.append(gatherer.summary(source.meta))
        if cache_dir is not None and processes.is_main:
            _cache_parts(cache_dir, source, features, missing, parts[-1])
    fields = SUMMARY_FIELDS.values()
    known = {field: value for part in parts for field in fields if (value := getattr(part, field)) is not None}
    return processes.from_main(dataclasses.replace(parts[0], **known) if parts else Summary(None, {}))


@dataclass(frozen=True)
class StoredSet:
    """An image set before its features are computed. At least one attribute is not None.

    Attributes:
        known: the statistics, if the set is a file that holds them.
        source: the images, if something is needed that the statistics lack.
    """

    known: Summary | None
    source: ImageSource | None

    @property
    def count(self) -> int | None:
        """Number of images, or None if it is not recorded."""
        if self.source is not None:
            return self.source.count
        return self.known.count if self.known else None


def open_set(path: str | Path, needs: Iterable[str], image_size: int | None = None) -> StoredSet:
    """Open the statistics and images at a path, as far as `needs` (keys of evaluation.summary.NEEDS) ask for them.

    A file may hold both, as ADM's reference batches do: then "moments" are its statistics, and the rest is computed from its
    images. With `image_size`, images are resized as by `open_source`.

    Raises:
        UsageError: the path holds neither images nor statistics, or the statistics lack something in `needs`.
    """
    if not holds_statistics(path):
        return StoredSet(None, open_source(path, image_size))
    if not set(needs) - {"moments"} or not holds_images(path):
        return StoredSet(statistics_summary(path, needs), None)
    return StoredSet(statistics_summary(path, ("moments",)), open_source(path, image_size))


def summarise_set(
    stored: StoredSet,
    features: FeatureNetwork,
    needs: Iterable[str],
    cache_dir: str | Path | None = None,
    batch_size: int = 200,
    processes: Processes = Processes(),  # noqa: B008
) -> Summary:
    """Summarize a set; the arguments are those of `summarise`.

    Raises:
        UsageError: as `summarise` does, or the statistics come from other features.
    """
    if stored.source is None:
        assert stored.known is not None
        return stored.known
    if stored.known is None:
        return summarise(stored.source, features, needs, cache_dir, batch_size, processes)
    images = summarise(stored.source, features, set(needs) - {"moments"}, cache_dir, batch_size, processes)
    check_comparable(images.meta, stored.known.meta)
    meta = {**stored.known.meta, **images.meta}
    return dataclasses.replace(images, count=stored.known.count, meta=meta, statistics=stored.known.statistics)


def holds_statistics(path: str | Path) -> bool:
    """Whether `path` is an .npy or .npz file of statistics rather than images.

    Raises:
        UsageError: the .npz cannot be read.
    """
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return path.suffix == ".npy" and not path.is_dir()
    try:
        with np.load(path, allow_pickle=False) as content:
            return "mu" in content
    except UNREADABLE as error:
        raise UsageError(f"cannot read statistics (arrays mu and sigma) from {path}: {error}") from error


def statistics_summary(path: str | Path, needs: Iterable[str]) -> Summary:
    """Load a summary from a file of statistics.

    Raises:
        UsageError: `needs` contains more than "moments", or the file cannot be read.
    """
    if beyond := set(needs) - {"moments"}:
        raise UsageError(
            f"{path} holds only the mean and covariance of features, which is enough for --metrics fid. The other metrics "
            f"need data that the file lacks ({', '.join(sorted(beyond))}); pass the images instead"
        )
    statistics = load_statistics(path)
    meta = {"file": str(path), **statistics.meta}
    return Summary(statistics.count, meta, statistics=dataclasses.replace(statistics, meta=meta))


def _subset(count: int) -> torch.Tensor | None:
    if count <= REFERENCE_ROWS:
        return None
    return torch.randperm(count, generator=generator_for(0, "reference rows", count))[:REFERENCE_ROWS]


def _part_path(cache_dir: str | Path, source: ImageSource, features: FeatureNetwork, need: str) -> Path:
    network = json.dumps(describe_features(features), sort_keys=True)
    key = hashlib.sha256(f"{network} {source.meta['fingerprint']}".encode()).hexdigest()[:8]
    suffix = "" if need == "moments" else f"_{need}"
    return Path(cache_dir) / f"{source.name}_{features.name}_{key}{suffix}.npz"


def _read_part(path: Path, need: str, source: ImageSource, features: FeatureNetwork) -> Summary | None:
    """The cached summary in a file, or None if the file is missing or was made from other images or features."""
    if not path.exists():
        return None
    part: Statistics | torch.Tensor
    if need in ("rows", "logits"):
        part, meta = _load_rows(path)
    else:
        part = load_statistics(path)
        meta = part.meta
    expected = {**source.meta, "resolution": meta.get("resolution"), "features": describe_features(features)}
    if meta != expected:
        return None
    return Summary(source.count, meta, features.device, **{SUMMARY_FIELDS[need]: part})  # type: ignore[arg-type]


def _load_rows(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as content:
            rows, meta = torch.from_numpy(content["rows"]), json.loads(str(content["metadata"]))
        if not (finite := finite_rows(rows)).all():
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(describe_not_finite("images have features that", bad, len(rows)))
        return rows, meta
    except UNREADABLE as error:
        raise UsageError(
            f"cannot read the cached features in {path}: {error}; delete the file to recompute them"
        ) from error


def _cache_parts(
    cache_dir: str | Path, source: ImageSource, features: FeatureNetwork, needs: Iterable[str], summary: Summary
) -> None:
    try:
        for need in needs:
            path, part = _part_path(cache_dir, source, features, need), getattr(summary, SUMMARY_FIELDS[need])
            if isinstance(part, Statistics):
                save_statistics(path, part)
            else:
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, rows=part.numpy(), metadata=np.array(json.dumps(summary.meta)))
    except OSError as error:  # the data directory may be read-only
        note(f"cannot cache the statistics in {cache_dir}, so they will be recomputed next time: {error}")
