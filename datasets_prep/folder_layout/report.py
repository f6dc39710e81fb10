"""The lines about the data that a script prints before any work."""

from collections.abc import Sequence

import numpy as np

from datasets_prep.folder_layout.entries import printable
from datasets_prep.image_dataset import ImageDataset
from runtime.messages import fact, warn

__all__ = ["class_names", "show_data"]

NAMED_CLASSES = 10


def show_data(dataset: ImageDataset, held_out: ImageDataset | None = None) -> None:
    """Print the numbers of images and classes. For a folder, also print what is left out, and warn of surprising counts.

    Args:
        dataset: the images that are used.
        held_out: the held-out images, if `dataset` are the training images and both are used.
    """
    survey = dataset.survey
    text = f"{dataset.facts.name}, {len(dataset):,} {'training' if dataset.split == 'train' else 'held-out'} images"
    if held_out is not None:
        text += f", {len(held_out):,} held out"
    if survey is not None:
        text += f" ({survey.held_out})" if held_out is not None else f" (held out: {survey.held_out})"
    fact("data", text)
    fact("classes", _describe_classes(dataset))
    if survey is not None:
        fact("left out", "; ".join(survey.left_out) or "nothing")
        for warning in survey.warnings:
            warn(warning)


def class_names(dataset: ImageDataset) -> Sequence[str]:
    """The names of the known classes, by label."""
    return dataset.facts.class_names if dataset.survey is None else dataset.survey.classes


def _describe_classes(dataset: ImageDataset) -> str:
    survey, names = dataset.survey, class_names(dataset)
    counts = np.bincount(dataset.stored_labels, minlength=len(names))
    if not names and len(counts) == 1:
        return "none" if survey is None else f"none, because {survey.no_classes}"
    names = [*names, *map(str, range(len(names), len(counts)))]
    source = "" if survey is None else f" {survey.source}"
    if len(counts) <= NAMED_CLASSES:
        listed = ", ".join(f"{printable(name)} {count:,}" for name, count in zip(names, counts, strict=True))
    else:
        least, most = int(counts.argmin()), int(counts.argmax())
        ends = (f"{counts[number]:,} ({printable(names[number])})" for number in (least, most))
        listed = f"{' to '.join(ends)} images each"
    return f"{len(counts):,}{source}: {listed}"
