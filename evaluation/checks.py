"""Checks that refuse a comparison before images are drawn or their features are computed."""

from collections.abc import Iterable, Sequence

import torch

from datasets_prep.image_dataset import DatasetFacts, shown_side
from evaluation.features.protocol import FeatureNetwork, describe_features
from evaluation.metrics import check_comparable, check_counts, check_widths
from evaluation.reference import StoredSet
from evaluation.sources import ImageSource
from evaluation.summary import NEEDS, Summary
from options import UsageError

__all__ = [
    "check_network",
    "check_pair_sizes",
    "check_reference",
    "check_scoring",
    "check_sizes",
    "resolution",
    "spread",
]

MEASURED = 64  # images of a set, evenly spaced, whose sizes are looked at


def spread(count: int) -> list[int]:
    """At most MEASURED indices, evenly spaced in 0..count - 1, with both ends."""
    chosen = min(count, MEASURED)
    return [number * (count - 1) // max(1, chosen - 1) for number in range(chosen)]


def resolution(source: ImageSource, indices: Iterable[int] | None = None) -> list[int] | str:
    """[height, width] of the images `indices` of a set, or "mixed". None: MEASURED images, evenly spaced.

    Raises:
        UsageError: an image cannot be read.
    """
    found: list[int] | None = None
    for index in spread(source.count) if indices is None else indices:
        size = list(source.extent(index))
        if found not in (None, size):
            return "mixed"
        found = size
    return found or "mixed"


def check_sizes(samples: StoredSet, real: StoredSet) -> None:
    """Check that two sets have the same image size, from MEASURED images of each. Two sets of mixed sizes may be compared.

    Before a refusal, all images are measured, because a set that looks uniform may not be.

    Raises:
        UsageError: the sizes differ, or an image cannot be read.
    """
    found = [_resolution_of(stored, whole=False) for stored in (samples, real)]
    if found[0] != found[1]:
        found = [_resolution_of(stored, whole=True) for stored in (samples, real)]
    check_comparable({"resolution": found[0]}, {"resolution": found[1]})


def check_network(known: Summary, features: FeatureNetwork) -> None:
    """Check that features of `features` can be compared with a set's statistics.

    Raises:
        UsageError: the statistics come from another network or have another number of features.
    """
    check_comparable({"features": describe_features(features)}, {"features": known.meta.get("features")})
    for need, statistics in (("moments", known.statistics), ("spatial", known.spatial)):
        if statistics is not None and NEEDS[need] in features.outputs:
            check_widths(features.outputs[NEEDS[need]], len(statistics.mean))


def check_scoring(
    features: FeatureNetwork, metrics: Sequence[str], samples: int, real: int | None, facts: DatasetFacts
) -> None:
    """Check that `samples` images like a dataset's can be scored against `real` ones (None: not known) at all.

    Raises:
        UsageError: there are too few images for a metric, or the network does not accept images of this size.
    """
    check_counts(metrics, samples, real)
    side = shown_side(facts)
    features(torch.zeros(1, facts.channels, side, side, dtype=torch.uint8), {"features"})


def check_reference(
    reference: Summary, features: FeatureNetwork, metrics: Sequence[str], samples: int, facts: DatasetFacts
) -> None:
    """Check that `samples` images like a dataset's can be scored against a reference.

    Raises:
        UsageError: as `check_scoring` does, or the reference has another image size or other features.
    """
    check_scoring(features, metrics, samples, reference.known_count, facts)
    check_comparable({"resolution": [shown_side(facts)] * 2}, {"resolution": reference.meta.get("resolution")})
    check_network(reference, features)


def check_pair_sizes(fake: ImageSource, true: ImageSource, indices: Iterable[int], smallest: int) -> None:
    """Check that images with the same index have the same size, of at least `smallest` pixels on each side.

    Raises:
        UsageError: they do not.
    """
    for index in indices:
        sizes = [source.extent(index) for source in (fake, true)]
        name = fake.names[index] if fake.names else f"number {index}"
        described = [f"{width} x {height}" for height, width in sizes]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"cannot compare images of different sizes: {name} is {described[0]} in {fake.name}, but {described[1]} in "
                f"{true.name}; use --image_size to bring both to one size"
            )
        if min(sizes[0]) < smallest:
            raise UsageError(
                f"SSIM or --lpips needs images of at least {smallest} x {smallest} pixels, but {name} of {fake.name} is "
                f"{described[0]}; --image_size enlarges both sets"
            )


def _resolution_of(stored: StoredSet, whole: bool) -> object:
    """The size of a set's images, which statistics may not record; "mixed" if MEASURED images or, with `whole`, all differ."""
    if stored.source is not None:
        return resolution(stored.source, range(stored.source.count) if whole else None)
    return stored.known.meta.get("resolution") if stored.known else None
