"""Scoring image sets: which metrics, against which reference, and a result that says how it was made."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from datasets_prep.datasets import ImageDataset
from evaluation.features.protocol import FeatureNetwork
from evaluation.jpeg import through_jpeg
from evaluation.label_counts import LabelCounts
from evaluation.metrics import METRICS, compute_metrics, error_bars
from evaluation.precision_effect import PrecisionEffect
from evaluation.reference import summarise
from evaluation.sources import dataset_source
from evaluation.summary import Gatherer, Summary
from options import UsageError, option
from runtime.distributed import Processes
from runtime.provenance import code_version

__all__ = [
    "IMAGE_FORMATS",
    "LabelledImages",
    "MetricOptions",
    "ScoreOptions",
    "ScoredBatch",
    "check_metrics",
    "needs_of",
    "reference_statistics",
    "result_line",
    "score_images",
    "score_summaries",
]

FEWEST_SAMPLES = 10_000  # with fewer, the bias of a Frechet distance is larger than most differences between methods
FEWEST_FOR_ERROR_BAR = 100
IMAGE_FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"png": lambda images: images, "jpg": through_jpeg}


@dataclass(frozen=True)
class MetricOptions:
    """Metrics."""

    metrics: tuple[str, ...] = option(
        ("fid",), "scores; fid is the Frechet distance, whatever the features", choices=METRICS, common=True
    )


@dataclass(frozen=True)
class ScoreOptions(MetricOptions):
    """Scoring."""

    error_bar: bool = option(True, "estimate each score's standard deviation from halves of the samples")
    image_format: str = option(
        "png", "score samples as they are (png), or through JPEG at PIL's default quality, as published scores (jpg)",
        choices=IMAGE_FORMATS,
    )  # fmt: skip


QUICK = ScoreOptions(error_bar=False)


class ScoredBatch(Protocol):
    """A batch to score: images uint8 [B, C, H, W], their indices in the set, and labels [B] or None."""

    @property
    def images(self) -> torch.Tensor:
        """uint8 [B, C, H, W]."""
        ...

    @property
    def indices(self) -> Sequence[int]:
        """Places of the images in the set."""
        ...

    @property
    def labels(self) -> torch.Tensor | None:
        """Class ids [B], where they were asked for."""
        ...


class LabelledImages(NamedTuple):
    """The plain `ScoredBatch`."""

    images: torch.Tensor
    indices: Sequence[int]
    labels: torch.Tensor | None = None


def check_metrics(names: Sequence[str]) -> None:
    """Refuse metrics that do not exist.

    Raises:
        UsageError: an unknown name.
    """
    for name in names:
        if name not in METRICS:
            raise UsageError(f"--metrics {name}: expected some of {', '.join(METRICS)}")


def needs_of(names: Sequence[str], *, reference: bool) -> frozenset[str]:
    """What the metrics need to know of the samples, or of the reference: keys of evaluation.summary.NEEDS."""
    check_metrics(names)
    needs = frozenset(METRICS[name].need for name in names if METRICS[name].against_reference or not reference)
    return needs or frozenset(("moments",))


def reference_statistics(
    dataset: ImageDataset,
    features: FeatureNetwork,
    folder: str | Path,
    metrics: Sequence[str] = ("fid",),
    processes: Processes = Processes(),  # noqa: B008
) -> Summary:
    """The real images of a split, as the metrics need them; cached in `statistics` below `folder`."""
    needs = needs_of(metrics, reference=True)
    return summarise(dataset_source(dataset), features, needs, Path(folder) / "statistics", processes=processes)


def score_images(
    batches: Iterable[ScoredBatch],
    features: FeatureNetwork,
    reference: Summary,
    class_names: Sequence[str] = (),
    options: ScoreOptions = QUICK,
    processes: Processes = Processes(),  # noqa: B008
) -> dict[str, Any]:
    """Consume `batches` and score them against `reference`.

    Args:
        batches: images; each is seen once.
        features: the feature network that `reference` was made with.
        reference: what is known of the real images.
        class_names: names of the labels, where the sampler was asked for labels.
        options: which metrics, error bars, and the images' format.
        processes: each has its part of the batches, and all get the result.

    Returns:
        The entries of `score_summaries` and "labels", their distribution. If the feature network is a classifier of just
        these classes, "recognised" is the share of images that it assigns to their label. If features are not computed in
        float32, "feature_precision_effect" says how much this matters.

    Raises:
        UsageError: unknown metrics, metrics that the feature network cannot serve, or sets that cannot be compared.
    """
    gatherer = Gatherer(features, needs_of(options.metrics, reference=False), grouped=options.error_bar)
    transform = IMAGE_FORMATS[options.image_format]
    labels = LabelCounts(features, class_names)
    effect = PrecisionEffect(features)
    for batch in batches:
        images = transform(batch.images)
        gatherer.update(images, batch.indices)
        labels.update(images, batch.labels)
        effect.update(images)
    gatherer.merge_all(processes)
    labels.merge_all(processes)
    return processes.from_main(_scored(gatherer, labels, effect, reference, options) if processes.is_main else {})


def _scored(
    gatherer: Gatherer, labels: LabelCounts, effect: PrecisionEffect, reference: Summary, options: ScoreOptions
) -> dict[str, Any]:
    meta = {"image_format": options.image_format}
    error_bar = options.error_bar and gatherer.count >= FEWEST_FOR_ERROR_BAR
    errors = error_bars(options.metrics, lambda groups: gatherer.summary(meta, groups), reference) if error_bar else {}
    result = score_summaries(options.metrics, gatherer.summary(meta), reference, errors)
    return result | labels.result() | effect.result(reference)


def score_summaries(
    metrics: Sequence[str], generated: Summary, reference: Summary, errors: dict[str, float] | None = None
) -> dict[str, Any]:
    """Score one summary against another.

    Returns:
        "metric", "value" and "error" of the first metric (error None: not estimated); "scores", the same of all by name;
        "samples", "resolution", "image_format", "features" (name) and "features_sha256", "reference" (its images, rows, source
        and hash) and "reference_samples", "warnings" and "code_version".
    """
    values = compute_metrics(metrics, generated, reference)
    scores = {
        name: {"metric": _title(name, generated, reference), "value": value, "error": (errors or {}).get(name)}
        for name, value in values.items()
    }
    features = generated.meta.get("features") or reference.meta.get("features") or {}
    source = {key: value for key, value in reference.meta.items() if key != "features"}
    rows = {} if reference.rows is None else {"rows": len(reference.rows)}
    return {
        **scores[metrics[0]],
        "scores": scores,
        "samples": generated.count,
        "resolution": generated.meta.get("resolution"),
        "image_format": generated.meta.get("image_format"),
        "features": features.get("name"),
        "features_sha256": features.get("sha256"),
        "feature_precision": features.get("precision", "fp32"),
        "reference": {"images": reference.count, **rows, **source, "sha256": reference.sha256()},
        "reference_samples": reference.count,
        "warnings": _warnings(generated, reference),
        "code_version": code_version(),
    }


def result_line(result: dict[str, Any]) -> str:
    """All scores with their error bars and the number of samples, on one line."""
    scores = ", ".join(
        f"{score['metric']} {_short(score['value'])}" + ("" if score["error"] is None else f" ± {score['error']:.2g}")
        for score in result["scores"].values()
    )
    jpeg = ", through JPEG" if result["image_format"] == "jpg" else ""
    return f"{scores} ({result['samples'] or 'unknown number of'} samples{jpeg})"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _title(name: str, generated: Summary, reference: Summary) -> str:
    features = generated.meta.get("features") or reference.meta.get("features")
    if name == "fid":
        return features["label"] if features else "Frechet distance"
    title = METRICS[name].title
    return title if not features or features["name"] == "inception" else f"{title} ({features['name']} features)"


def _warnings(generated: Summary, reference: Summary) -> list[str]:
    found = []
    if generated.count is None:
        found.append("the number of samples is not recorded")
    elif generated.count < FEWEST_SAMPLES:
        found.append(f"{generated.count} samples are fewer than {FEWEST_SAMPLES}; scores of more are not comparable")
    for what, summary in (("samples", generated), ("reference images", reference)):
        known = summary.statistics or summary.spatial
        if known is not None and summary.count is not None and summary.count <= len(known.mean):
            found.append(f"{summary.count} {what} are too few for a covariance of {len(known.mean)} features")
    formats = [summary.meta.get("image_format") for summary in (generated, reference)]
    if None not in formats and formats[0] != formats[1]:
        found.append(f"the samples are scored as {formats[0]}, the reference as {formats[1]}")
    if generated.meta.get("resolution") and not reference.meta.get("resolution"):
        found.append("the reference does not tell the size of its images, which should be that of the samples")
    return found
