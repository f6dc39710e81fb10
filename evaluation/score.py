"""Scoring image sets: which metrics, against which reference, and a result that says how it was made."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from datasets_prep.datasets import ImageDataset
from evaluation.features.networks import FeatureNetwork
from evaluation.jpeg import through_jpeg
from evaluation.metrics import METRICS, compute_metrics, error_bars, frechet_distance
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
LISTED_CLASSES = 100
PROBED = 1000  # images whose features are computed in both precisions
IMAGE_FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"png": lambda images: images, "jpg": through_jpeg}


@dataclass(frozen=True)
class MetricOptions:
    """Metrics."""

    metrics: tuple[str, ...] = option(
        ("fid",), f"which scores: {', '.join(METRICS)}; fid is the Frechet distance, whatever the features"
    )


@dataclass(frozen=True)
class ScoreOptions(MetricOptions):
    """Scoring."""

    error_bar: bool = option(True, "estimate each score's standard deviation from halves of the samples")
    image_format: str = option(
        "png", "score samples as they are (png), or through JPEG at PIL's default quality, as published scores (jpg)",
        choices=tuple(IMAGE_FORMATS),
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
    """What the metrics need of the samples, or of the reference."""
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
        class_names: of the labels, where they were asked for.
        options: which metrics, error bars, and the images' format.
        processes: each has its part of the batches, and all get the result.

    Returns:
        What `score_summaries` says, and "labels", their distribution; "recognised", where the feature network is a classifier
        of just these classes: the share of images it takes for their label; "feature_precision_effect" where features
        are not in float32.
    """
    gatherer = Gatherer(features, needs_of(options.metrics, reference=False), grouped=options.error_bar)
    transform = IMAGE_FORMATS[options.image_format]
    labels = _Labels(features, class_names)
    probe = _PrecisionProbe(features)
    for batch in batches:
        images = transform(batch.images)
        gatherer.update(images, batch.indices)
        labels.update(images, batch.labels)
        probe.update(images)
    gatherer.merge_all(processes)
    labels.merge_all(processes)
    return processes.from_main(_scored(gatherer, labels, probe, reference, options) if processes.is_main else {})


def _scored(
    gatherer: Gatherer, labels: "_Labels", probe: "_PrecisionProbe", reference: Summary, options: ScoreOptions
) -> dict[str, Any]:
    meta = {"image_format": options.image_format}
    error_bar = options.error_bar and gatherer.count >= FEWEST_FOR_ERROR_BAR
    errors = error_bars(options.metrics, lambda groups: gatherer.summary(meta, groups), reference) if error_bar else {}
    result = score_summaries(options.metrics, gatherer.summary(meta), reference, errors)
    return result | labels.result() | probe.result(reference)


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
    """All scores with their error bars, what they were made of, and the warnings, on one line."""
    scores = ", ".join(
        f"{score['metric']} {_short(score['value'])}" + ("" if score["error"] is None else f" ± {score['error']:.2g}")
        for score in result["scores"].values()
    )
    jpeg = ", through JPEG" if result["image_format"] == "jpg" else ""
    warnings = "".join(f"; warning: {warning}" for warning in result["warnings"])
    return f"{scores} ({result['samples'] or 'unknown number of'} samples{jpeg}){warnings}"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _title(name: str, generated: Summary, reference: Summary) -> str:
    features = generated.meta.get("features") or reference.meta.get("features")
    if name == "fid":
        return features["label"] if features else "Frechet distance"
    usual = not features or features["name"] == "inception"
    return METRICS[name].title if usual else f"{METRICS[name].title} ({features['name']} features)"  # type: ignore[index]


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


class _Labels:
    """Counts labels and, where the feature network is a classifier of these classes, the images taken for their label."""

    def __init__(self, features: FeatureNetwork, class_names: Sequence[str]) -> None:
        self._features, self._names = features, tuple(class_names)
        self._classifies = bool(class_names) and self._names == tuple(getattr(features, "classes", ()))
        self._counts = torch.zeros(0, dtype=torch.long)
        self._recognised = 0

    def update(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        if labels is None:
            return
        self._add(torch.bincount(labels))
        if self._classifies:
            predicted = self._features.probabilities(images).argmax(1)  # type: ignore[attr-defined]
            self._recognised += int((predicted.cpu() == labels).sum())

    def _add(self, counts: torch.Tensor) -> None:
        longer, shorter = sorted((counts, self._counts), key=len, reverse=True)
        self._counts = longer.clone()
        self._counts[: len(shorter)] += shorter

    def merge_all(self, processes: Processes) -> None:
        """Let the main process have the counts of all processes."""
        shares = processes.gather((self._counts, self._recognised))
        for counts, recognised in shares[1:]:
            self._add(counts)
            self._recognised += recognised

    def result(self) -> dict[str, Any]:
        counts = self._counts.tolist()
        if not counts:
            return {}
        if len(counts) <= LISTED_CLASSES:
            names = self._names if len(self._names) == len(counts) else [str(label) for label in range(len(counts))]
            result: dict[str, Any] = {"labels": dict(zip(names, counts, strict=True))}
        else:
            result = {"labels": {"classes": len(counts), "fewest": min(counts), "most": max(counts)}}
        return result | ({"recognised": self._recognised / sum(counts)} if self._classifies else {})


class _PrecisionProbe:
    """How much features of lower precision change the distance of the first PROBED images from the reference."""

    def __init__(self, features: FeatureNetwork) -> None:
        lowered = getattr(features, "precision", "fp32") != "fp32"
        networks = {features.precision: features, "fp32": features.exact()} if lowered else {}  # type: ignore[attr-defined]
        self._gatherers = {name: Gatherer(network, ("moments",)) for name, network in networks.items()}

    def update(self, images: torch.Tensor) -> None:
        for gatherer in self._gatherers.values():
            if gatherer.count < PROBED:
                gatherer.update(images[: PROBED - gatherer.count])

    def result(self, reference: Summary) -> dict[str, Any]:
        if not self._gatherers or reference.statistics is None:
            return {}
        known = {name: gatherer.summary().statistics for name, gatherer in self._gatherers.items()}
        values = {name: frechet_distance(s, reference.statistics) for name, s in known.items() if s is not None}
        images = next(iter(self._gatherers.values())).count
        print(f"effect of --feature_precision on the distance of the first {images} images: {values}")
        return {"feature_precision_effect": {"images": images, **values}}
