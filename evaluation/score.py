"""Scoring of image sets against a reference. Results record the scores and the settings that produced them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from datasets_prep.datasets import ImageDataset
from evaluation.features.protocol import FeatureNetwork
from evaluation.jpeg import through_jpeg
from evaluation.label_counts import LabelCounts
from evaluation.metrics import INCEPTION_SPLITS, METRICS, check_comparable, compute_metrics, error_bars
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

FEWEST_SAMPLES = 10_000  # below this, the bias of a Frechet distance exceeds most differences between methods
FEWEST_FOR_ERROR_BAR = 100
FEWEST_PER_SPLIT = 10  # samples; with one per split, every Inception Score is 1
IMAGE_FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"png": lambda images: images, "jpg": through_jpeg}


@dataclass(frozen=True)
class MetricOptions:
    """Metrics."""

    metrics: tuple[str, ...] = option(
        ("fid",),
        "metrics to compute; fid is the Frechet distance between the chosen --features",
        choices=METRICS,
        common=True,
    )


@dataclass(frozen=True)
class ScoreOptions(MetricOptions):
    """Scoring."""

    error_bar: bool = option(True, "estimate each score's standard deviation by comparing halves of the samples")
    image_format: str = option(
        "png", "png: score the samples as they are; jpg: compress them as JPEG first, at PIL's default quality, as LFM did",
        choices=IMAGE_FORMATS,
    )  # fmt: skip


QUICK = ScoreOptions(error_bar=False)


class ScoredBatch(Protocol):
    """A batch of images to score."""

    @property
    def images(self) -> torch.Tensor:
        """Images uint8 [B, C, H, W]."""
        ...

    @property
    def indices(self) -> Sequence[int]:
        """Indices of the images in the set."""
        ...

    @property
    def labels(self) -> torch.Tensor | None:
        """Class ids [B], or None for unconditional samples."""
        ...


class LabelledImages(NamedTuple):
    """A minimal `ScoredBatch`."""

    images: torch.Tensor
    indices: Sequence[int]
    labels: torch.Tensor | None = None


def check_metrics(names: Sequence[str]) -> None:
    """Check that all metrics exist.

    Raises:
        UsageError: a name is unknown.
    """
    for name in names:
        if name not in METRICS:
            raise UsageError(f"--metrics {name}: expected one or more of {', '.join(METRICS)}")


def needs_of(names: Sequence[str], *, reference: bool) -> frozenset[str]:
    """List the inputs that metrics need from the samples or, with `reference`, from the reference.

    Returns:
        Keys of evaluation.summary.NEEDS, at least one.

    Raises:
        UsageError: an unknown metric.
    """
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
    """Summarize the images of a dataset split for the given metrics, with a cache in `folder`/statistics."""
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
        batches: batches of images, iterated once. Each process passes its own share.
        features: the feature network used for `reference`.
        reference: summary of the real images.
        class_names: names of the labels, ordered by class id, for conditional samples.
        options: metrics, error bars and image format.
        processes: processes that share the batches. All return the same result.

    Returns:
        The entries of `score_summaries`, and "labels", the number of images with each label. If the feature network
        classifies exactly these classes, "recognised" is the fraction of images assigned to their label. If the features are
        not computed in float32, "feature_precision_effect" shows the effect on the Fréchet distance.

    Raises:
        UsageError: a metric is unknown or the feature network does not support it, the sets cannot be compared, or a batch has
            more or fewer indices or labels than images.
    """
    gatherer = Gatherer(features, needs_of(options.metrics, reference=False), grouped=options.error_bar)
    transform = IMAGE_FORMATS[options.image_format]
    labels = LabelCounts(features, class_names)
    effect = PrecisionEffect(features)
    size = reference.meta.get("resolution")
    for batch in batches:
        _check_lengths(batch)
        images = transform(batch.images)
        if size != "mixed":
            check_comparable({"resolution": list(images.shape[2:])}, {"resolution": size})
        gatherer.update(images, batch.indices)
        labels.update(images, batch.labels)
        effect.update(images)
    gatherer.merge_all(processes)
    labels.merge_all(processes)
    return processes.from_main(_scored(gatherer, labels, effect, reference, options) if processes.is_main else {})


def _check_lengths(batch: ScoredBatch) -> None:
    found = {"indices": len(batch.indices), "labels": len(batch.images if batch.labels is None else batch.labels)}
    for name, count in found.items():
        if count != len(batch.images):
            raise UsageError(
                f"expected as many {name} as images in a batch, but got {count} for {len(batch.images)} images"
            )


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
        A dictionary with these entries:

        - "metric", "value" and "error" of the first metric; error is None if not estimated;
        - "scores": the same for all metrics, by name;
        - "samples", "resolution" and "image_format";
        - "features" (the network's name), "features_sha256" and "feature_precision";
        - "reference" (number of images and rows, source and hash) and "reference_samples";
        - "warnings" and "code_version".

    Raises:
        UsageError: a metric is unknown, or the sets cannot be compared.
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
        "warnings": _warnings(metrics, generated, reference),
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
    if not features or features["name"] == "inception":
        return title
    _, _, qualifier = features["label"].partition("(")  # as in FD (DINOv2 ViT-B/14)
    return f"{title} ({qualifier or features['name'] + ' features)'}"


def _warnings(metrics: Sequence[str], generated: Summary, reference: Summary) -> list[str]:
    found = []
    if "is" in metrics and generated.count is not None and generated.count < FEWEST_PER_SPLIT * INCEPTION_SPLITS:
        found.append(f"{generated.count} samples in {INCEPTION_SPLITS} splits are too few for an Inception Score")
    if generated.count is None:
        found.append("the number of samples is not recorded")
    elif generated.count < FEWEST_SAMPLES:
        found.append(
            f"{generated.count} samples are fewer than {FEWEST_SAMPLES}; compare it only with scores of equally many samples"
        )
    for what, summary in (("samples", generated), ("reference images", reference)):
        known = summary.statistics or summary.spatial
        if known is not None and summary.count is not None and summary.count <= len(known.mean):
            found.append(f"{summary.count} {what} are too few to estimate a covariance of {len(known.mean)} features")
    formats = [summary.meta.get("image_format") for summary in (generated, reference)]
    if None not in formats and formats[0] != formats[1]:
        found.append(f"the samples are scored as {formats[0]}, but the reference as {formats[1]}")
    if generated.meta.get("resolution") and not reference.meta.get("resolution"):
        found.append("the reference does not record its image size; check that it matches the samples")
    return found
