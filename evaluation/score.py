"""Scoring a stream of samples: Frechet distance to a dataset's training images, and how often a classifier agrees."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from datasets_prep.datasets import ImageDataset
from evaluation.features import FeatureNetwork
from evaluation.generate import GeneratedBatch
from evaluation.metrics import frechet_distance
from evaluation.statistics import RunningMoments, Statistics, dataset_statistics
from runtime.distributed import Processes

__all__ = ["reference_statistics", "score_samples"]


def reference_statistics(
    dataset: ImageDataset,
    features: FeatureNetwork,
    datadir: str | Path,
    processes: Processes = Processes(),  # noqa: B008
) -> Statistics:
    """Statistics of a split's features, cached in `statistics` below the data directory."""
    return dataset_statistics(dataset, features, Path(datadir) / "statistics", processes=processes)


def score_samples(
    batches: Iterable[GeneratedBatch],
    features: FeatureNetwork,
    reference: Statistics,
    class_names: Sequence[str] = (),
    processes: Processes = Processes(),  # noqa: B008
) -> dict[str, Any]:
    """Consume `batches` and score them against `reference`.

    Args:
        batches: samples; each is seen once.
        features: the feature network that `reference` was made with.
        reference: statistics of the real images.
        class_names: of the samples' labels, where they were asked for.
        processes: each has its part of the batches, and all get the result.

    Returns:
        "metric" (its label), "value", "samples", "reference_samples", "features", "features_sha256", and, where the
        feature network is a classifier of just these classes, "recognised": the share of samples it takes for the class
        asked for.
    """
    moments = RunningMoments(features.dims)
    classifies = bool(class_names) and tuple(class_names) == tuple(getattr(features, "classes", ()))
    recognised = 0
    for batch in batches:
        moments.update(features(batch.images))
        if classifies:
            predicted = features.probabilities(batch.images).argmax(1)  # type: ignore[attr-defined]
            recognised += int((predicted.cpu() == batch.labels).sum())
    moments = moments.of_all(processes)
    distance = frechet_distance(moments.statistics(), reference) if processes.is_main else 0.0
    result: dict[str, Any] = {
        "metric": features.label,
        "value": processes.from_main(distance),
        "samples": moments.count,
        "reference_samples": reference.count,
        "features": features.name,
        "features_sha256": features.sha256,
    }
    if classifies:
        result["recognised"] = int(processes.sum(torch.tensor(recognised))) / moments.count
    return result
