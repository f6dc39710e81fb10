"""Summaries of whole image sets, usually of real images. A dataset's summary is cached in files."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.features.protocol import FeatureNetwork, describe_features
from evaluation.sources import ImageSource, image_batches, open_source
from evaluation.statistics import Statistics, load_statistics, save_statistics
from evaluation.summary import Gatherer, Summary
from options import UsageError
from runtime.distributed import Processes
from runtime.files import UNREADABLE, atomic_path
from runtime.messages import note
from runtime.randomness import generator_for

__all__ = ["REFERENCE_ROWS", "holds_statistics", "statistics_summary", "summarise", "summary_at"]

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


def summary_at(
    path: str | Path, features: FeatureNetwork, needs: Iterable[str], batch_size: int, processes: Processes
) -> Summary:
    """Summarize the images at a path, or load the statistics stored there.

    Args:
        path: images, as for `open_source`, or an .npz or .npy file of statistics.
        features: the feature network, unused for statistics.
        needs: keys of evaluation.summary.NEEDS.
        batch_size: images per batch.
        processes: processes that share the images. All return the same summary.

    Raises:
        UsageError: the path holds neither images nor statistics, or the statistics lack something in `needs`.
    """
    if holds_statistics(path):
        return statistics_summary(path, needs)
    return summarise(open_source(path), features, needs, None, batch_size, processes)


def holds_statistics(path: str | Path) -> bool:
    """Whether `path` is an .npy or .npz file of statistics rather than images.

    Raises:
        UsageError: the .npz cannot be read.
    """
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return path.suffix == ".npy"
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
            return torch.from_numpy(content["rows"]), json.loads(str(content["metadata"]))
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
