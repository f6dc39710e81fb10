"""Scoring of one path's images or statistics against another's (fid_score.py)."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from command_line import help_flags
from datasets_prep.datasets import DATASETS, DatasetOptions, open_dataset
from datasets_prep.images import LARGEST_SIZE
from evaluation.checks import check_network, check_sizes
from evaluation.features.inception import INCEPTION_DIMS
from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import FEATURES, FeatureOptions, load_features
from evaluation.metrics import check_counts
from evaluation.reference import StoredSet, open_set, summarise_set
from evaluation.score import LabelledImages, ScoreOptions, needs_of, score_images, score_summaries
from evaluation.sources import dataset_source, image_batches
from evaluation.summary import Summary
from options import UsageError, option

__all__ = ["ComparisonOptions", "compare", "split_paths"]


@dataclass(frozen=True)
class ComparisonOptions:
    """Image sets."""

    batch_size: int = option(50, "images per batch", minimum=1)
    image_size: int | None = option(
        None,
        "resize and center-crop images to this size in pixels; default: no resizing",
        minimum=1,
        maximum=LARGEST_SIZE,
    )
    datadir: str = option("./data", "directory of the dataset's files, if REAL is the name of a dataset")
    output_json: str | None = option(None, "JSON file for the result")


def split_paths(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into two paths, given before or after the flags, and the flags.

    Raises:
        UsageError: there are not two paths.
    """
    if wanted := help_flags(arguments):
        return [], wanted
    first = bool(arguments) and not arguments[0].startswith("-")
    paths, flags = (arguments[:2], arguments[2:]) if first else (arguments[-2:], arguments[:-2])
    if len(paths) < 2 or any(path.startswith("-") for path in paths):
        raise UsageError(
            "expected two paths before or after the flags: the images to score and the images to compare them with "
            "(see --help)"
        )
    return list(paths), list(flags)


def compare(
    generated: str,
    real: str,
    comparison: ComparisonOptions,
    scoring: ScoreOptions,
    features: FeatureOptions,
    device: torch.device,
) -> dict[str, Any]:
    """Score one path's images or statistics against another's.

    Args:
        generated: a folder of images, an .npz file of images, an LMDB, or a file of statistics (.npz, .npy).
        real: the same, or the name of a dataset, whose training split is used.
        comparison: image size, batch size and the dataset's directory. The caller writes the output file.
        scoring: metrics, error bars and image format.
        features: the feature network. It is not loaded if both paths are files of statistics.
        device: where the feature network runs.

    Returns:
        The entries of `evaluation.score.score_images` or, if `generated` is a file of statistics, of `score_summaries`.

    Raises:
        UsageError: a path cannot be read, a metric is unknown, or the sets cannot be compared.
    """
    needs = {generated: needs_of(scoring.metrics, reference=False)}
    needs[real] = needs_of(scoring.metrics, reference=True) | needs.get(real, frozenset())
    true, cache_dir = _open_real(real, needs[real], comparison)
    fake = true if generated == real else open_set(generated, needs[generated], comparison.image_size)
    check_counts(scoring.metrics, fake.count, true.count)
    if fake.source is None and true.source is None:
        assert fake.known is not None
        assert true.known is not None
        return score_summaries(scoring.metrics, fake.known, true.known)
    _check_padding(fake, true, comparison.image_size)
    check_sizes(fake, true)
    known = [stored.known for stored in (fake, true) if stored.known is not None]
    network = _choose_features(known, features, device)
    for summary in known:
        check_network(summary, network)
    reference = summarise_set(true, network, needs[real], cache_dir, comparison.batch_size)
    if fake.known is None:
        assert fake.source is not None
        images = image_batches(fake.source, comparison.batch_size)
        return score_images((LabelledImages(*batch) for batch in images), network, reference, (), scoring)
    samples = summarise_set(fake, network, needs[generated], None, comparison.batch_size)
    return score_summaries(scoring.metrics, samples, reference)


def _check_padding(fake: StoredSet, true: StoredSet, image_size: int | None) -> None:
    """Refuse a size to which samples are resized, but which a dataset reaches only by padding, without which it is compared."""
    if image_size is None or fake.source is None or true.source is None:
        return
    side = true.source.extent(0)[0]
    if side != image_size:
        raise UsageError(
            f"--image_size {image_size}: {true.source.name} has {side} x {side} images, which are compared without padding: "
            f"use --image_size {side}"
        )


def _open_real(real: str, needs: Iterable[str], comparison: ComparisonOptions) -> tuple[StoredSet, Path | None]:
    """Open the real images. Also return the folder of cached statistics if they are a dataset."""
    if real in DATASETS and not Path(real).exists():
        data = DatasetOptions(dataset=real, datadir=comparison.datadir)
        if comparison.image_size is not None:
            data = dataclasses.replace(data, image_size=comparison.image_size)
        return StoredSet(None, dataset_source(open_dataset(data, "train"))), data.derived / "statistics"
    return open_set(real, needs, comparison.image_size), None


def _choose_features(known: Iterable[Summary], options: FeatureOptions, device: torch.device) -> FeatureNetwork:
    """Load the network named in `options`, or the network recorded in the statistics; Inception if neither names one.

    The number of features in the statistics selects Inception's layer.
    """
    name = options.features
    for summary in known:
        recorded = summary.meta.get("features", {}).get("name", "inception")
        name = name or next((key for key in FEATURES if recorded.startswith(key)), "inception")
        if summary.statistics is not None and len(summary.statistics.mean) in INCEPTION_DIMS:
            options = dataclasses.replace(options, dims=len(summary.statistics.mean))
    return load_features(name or "inception", options, device)
