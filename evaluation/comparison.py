"""Scores of the images or statistics at one path against another's (fid_score.py)."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from command_line import help_flags
from datasets_prep.datasets import DATASETS, DatasetOptions, open_dataset
from evaluation.features.inception import INCEPTION_DIMS
from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import FEATURES, FeatureOptions, load_features
from evaluation.reference import holds_statistics, statistics_summary, summarise
from evaluation.score import LabelledImages, ScoreOptions, needs_of, score_images, score_summaries
from evaluation.sources import ImageSource, dataset_source, image_batches, open_source
from evaluation.summary import Summary
from options import UsageError, option

__all__ = ["ComparisonOptions", "compare", "split_paths"]


@dataclass(frozen=True)
class ComparisonOptions:
    """Image sets."""

    batch_size: int = option(50, "images at a time", minimum=1)
    image_size: int | None = option(
        None, "resize and crop images to this side first, in pixels; default: as they are", minimum=1
    )
    datadir: str = option("./data", "directory of the files of REAL, where that is the name of a dataset")
    output_json: str | None = option(None, "file to write the result to")


def split_paths(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The two paths GENERATED and REAL, before or after the flags, and the flags.

    Raises:
        UsageError: there are not two.
    """
    if wanted := help_flags(arguments):
        return [], wanted
    first = bool(arguments) and not arguments[0].startswith("-")
    paths, flags = (arguments[:2], arguments[2:]) if first else (arguments[-2:], arguments[:-2])
    if len(paths) < 2 or any(path.startswith("-") for path in paths):
        raise UsageError(
            "expected two paths, GENERATED and REAL, each a folder of images, an .npz, an LMDB or an .npz or .npy file of "
            "statistics; REAL may be the name of a dataset"
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
    """Score the images or statistics at one path against another's.

    Args:
        generated: path of a folder, an .npz, an LMDB, or a file of statistics.
        real: the same, or the name of a dataset.
        comparison: image size, batch size and the dataset's directory; its output file is the caller's concern.
        scoring: metrics, error bars and image format.
        features: the feature network. Two files of statistics need none.
        device: where the feature network runs.

    Returns:
        The entries of `evaluation.score.score_images`; for statistics, of `score_summaries`.

    Raises:
        UsageError: nothing readable, unknown metrics, or sets that cannot be compared.
    """
    needs = {generated: needs_of(scoring.metrics, reference=False)}
    needs[real] = needs_of(scoring.metrics, reference=True) | needs.get(real, frozenset())
    known = {path: statistics_summary(path, needs[path]) for path in needs if holds_statistics(path)}
    if len(known) == len(needs):
        return score_summaries(scoring.metrics, known[generated], known[real])
    network = _choose_features(known.values(), features, device)
    if real not in known:
        source, cache_dir = _open_real(real, comparison)
        known[real] = summarise(source, network, needs[real], cache_dir, comparison.batch_size)
    if generated in known and generated != real:
        return score_summaries(scoring.metrics, known[generated], known[real])
    images = image_batches(open_source(generated, comparison.image_size), comparison.batch_size)
    return score_images((LabelledImages(*batch) for batch in images), network, known[real], (), scoring)


def _open_real(real: str, comparison: ComparisonOptions) -> tuple[ImageSource, Path | None]:
    """The images, and where their statistics are kept, if they are a dataset's."""
    if real in DATASETS and not Path(real).exists():
        data = DatasetOptions(dataset=real, datadir=comparison.datadir)
        if comparison.image_size is not None:
            data = dataclasses.replace(data, image_size=comparison.image_size)
        return dataset_source(open_dataset(data, "train")), data.derived / "statistics"
    return open_source(real, comparison.image_size), None


def _choose_features(known: Iterable[Summary], options: FeatureOptions, device: torch.device) -> FeatureNetwork:
    """Load the network asked for, else the one in the statistics file, else Inception at the file's number of features."""
    name = options.features
    for summary in known:
        recorded = summary.meta.get("features", {}).get("name", "inception")
        name = name or next((key for key in FEATURES if recorded.startswith(key)), "inception")
        if summary.statistics is not None and len(summary.statistics.mean) in INCEPTION_DIMS:
            options = dataclasses.replace(options, dims=len(summary.statistics.mean))
    return load_features(name or "inception", options, device)
