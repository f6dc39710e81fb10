"""The work of fid_score.py and cal_inpainting.py: image sets by path, compared."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datasets_prep.datasets import DATASETS, DatasetOptions, open_dataset
from evaluation.features.inception import INCEPTION_DIMS
from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import FEATURES, FeatureOptions, load_features
from evaluation.reference import holds_statistics, statistics_summary, summarise
from evaluation.score import LabelledImages, ScoreOptions, needs_of, score_images, score_summaries
from evaluation.sources import ImageSource, dataset_source, image_batches, open_source
from evaluation.summary import Summary
from options import Options, UsageError, option
from runtime.precision import DeviceOptions, choose_device

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
    if "-h" in arguments or "--help" in arguments:
        return [], ["--help"]
    first = bool(arguments) and not arguments[0].startswith("-")
    paths, flags = (arguments[:2], arguments[2:]) if first else (arguments[-2:], arguments[:-2])
    if len(paths) < 2 or any(path.startswith("-") for path in paths):
        raise UsageError(
            "expected two paths, GENERATED and REAL, each a folder of images, an .npz, an LMDB or an .npz or .npy file of "
            "statistics; REAL may be the name of a dataset"
        )
    return list(paths), list(flags)


def compare(generated: str, real: str, options: Options) -> dict[str, Any]:
    """Score the images or statistics at one path against those at another; see `evaluation.score.score_images`.

    Raises:
        UsageError: nothing readable, unknown metrics, or sets that cannot be compared.
    """
    scoring, settings = options[ScoreOptions], options[ComparisonOptions]
    needs = {generated: needs_of(scoring.metrics, reference=False), real: needs_of(scoring.metrics, reference=True)}
    known = {path: statistics_summary(path, needs[path]) for path in needs if holds_statistics(path)}
    if len(known) == len(needs):
        return score_summaries(scoring.metrics, known[generated], known[real])
    features = _choose_features(known.values(), options[FeatureOptions], choose_device(options[DeviceOptions]))
    if real not in known:
        source, cache_dir = _open_real(real, settings)
        known[real] = summarise(source, features, needs[real], cache_dir, settings.batch_size)
    if generated in known and generated != real:
        return score_summaries(scoring.metrics, known[generated], known[real])
    images = image_batches(open_source(generated, settings.image_size), settings.batch_size)
    return score_images((LabelledImages(*batch) for batch in images), features, known[real], (), scoring)


def _open_real(real: str, settings: ComparisonOptions) -> tuple[ImageSource, Path | None]:
    """The images, and where their statistics are kept, if they are a dataset's."""
    if real in DATASETS and not Path(real).exists():
        data = DatasetOptions(dataset=real, datadir=settings.datadir)
        if settings.image_size is not None:
            data = dataclasses.replace(data, image_size=settings.image_size)
        return dataset_source(open_dataset(data, "train")), data.derived / "statistics"
    return open_source(real, settings.image_size), None


def _choose_features(known: Iterable[Summary], options: FeatureOptions, device: torch.device) -> FeatureNetwork:
    """Those asked for, else those of the statistics file, else Inception at the file's number of features."""
    name = options.features
    for summary in known:
        recorded = summary.meta.get("features", {}).get("name", "inception")
        name = name or next((key for key in FEATURES if recorded.startswith(key)), "inception")
        if summary.statistics is not None and len(summary.statistics.mean) in INCEPTION_DIMS:
            options = dataclasses.replace(options, dims=len(summary.statistics.mean))
    return load_features(name or "inception", options, device)
