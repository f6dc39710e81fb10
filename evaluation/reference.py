"""Summaries of whole image sets, mostly real ones; a dataset's summary is cached in files."""

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
from runtime.randomness import generator_for

__all__ = ["REFERENCE_ROWS", "holds_statistics", "statistics_summary", "summarise", "summary_at"]

REFERENCE_ROWS = 10_000  # of a reference, a random subset of the features is kept: as many as ADM's evaluation has
FIELDS = {"moments": "statistics", "spatial": "spatial", "rows": "rows", "logits": "logits"}  # of Summary


def summarise(
    source: ImageSource,
    features: FeatureNetwork,
    needs: Iterable[str],
    cache_dir: str | Path | None = None,
    batch_size: int = 200,
    processes: Processes = Processes(),  # noqa: B008
) -> Summary:
    """What `needs` (keys of evaluation.summary.NEEDS) ask of all images of a source; rows of REFERENCE_ROWS of them.

    With `cache_dir`, what is known is read from files there, and what was computed is written to them. Several processes
    share the images, and all get the result.
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
            _keep_parts(cache_dir, source, features, missing, parts[-1])
    known = {field: value for part in parts for field in FIELDS.values() if (value := getattr(part, field)) is not None}
    return processes.from_main(dataclasses.replace(parts[0], **known) if parts else Summary(None, {}))


def summary_at(
    path: str | Path, features: FeatureNetwork, needs: Iterable[str], batch_size: int, processes: Processes
) -> Summary:
    """What `needs` ask of the statistics, or of the images, at a path.

    Raises:
        UsageError: there is neither, or the statistics do not hold what is needed.
    """
    if holds_statistics(path):
        return statistics_summary(path, needs)
    return summarise(open_source(path), features, needs, None, batch_size, processes)


def holds_statistics(path: str | Path) -> bool:
    """Whether `path` is a file of statistics, .npy or .npz, rather than images."""
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return path.suffix == ".npy"
    try:
        with np.load(path, allow_pickle=False) as content:
            return "mu" in content
    except UNREADABLE as error:
        raise UsageError(f"cannot read statistics (arrays mu and sigma) from {path}: {error}") from error


def statistics_summary(path: str | Path, needs: Iterable[str]) -> Summary:
    """The summary in a file of statistics.

    Raises:
        UsageError: `needs` ask for more than the moments of features, or the file cannot be read.
    """
    if beyond := set(needs) - {"moments"}:
        raise UsageError(
            f"{path} holds the mean and covariance of features, from which a Frechet distance follows, but not what the "
            f"other metrics need ({', '.join(sorted(beyond))}): give the images themselves"
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
    """What a file holds, or None where it is missing or describes other images or features."""
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
    return Summary(source.count, meta, features.device, **{FIELDS[need]: part})  # type: ignore[arg-type]


def _load_rows(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as content:
            return torch.from_numpy(content["rows"]), json.loads(str(content["metadata"]))
    except UNREADABLE as error:
        raise UsageError(f"cannot read the features in {path}: {error}; remove it, and it is made anew") from error


def _keep_parts(
    cache_dir: str | Path, source: ImageSource, features: FeatureNetwork, needs: Iterable[str], summary: Summary
) -> None:
    try:
        for need in needs:
            path, part = _part_path(cache_dir, source, features, need), getattr(summary, FIELDS[need])
            if isinstance(part, Statistics):
                save_statistics(path, part)
            else:
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, rows=part.numpy(), metadata=np.array(json.dumps(summary.meta)))
    except OSError as error:  # the data directory may be read-only
        print(f"note: the statistics are not kept: {error}")
