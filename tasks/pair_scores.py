"""Scores that are gathered from samples and the images they stand for, as they come; and the first of them, recognition."""

from typing import Any, Protocol

import torch

from datasets_prep.datasets import ImageDataset
from evaluation.features.protocol import FeatureNetwork, predict_classes

__all__ = ["PairScore", "Recognition", "recognises", "recognition"]


class PairScore(Protocol):
    """A score that is gathered from samples and their images as they come."""

    def update(self, samples: torch.Tensor, originals: torch.Tensor, places: torch.Tensor) -> None:
        """Add samples and images uint8 [B, C, H, W], which are those of numbers `places` [B]."""
        ...

    def totals(self) -> torch.Tensor:
        """Sums float64, which may be added over processes."""
        ...

    def result(self, totals: torch.Tensor) -> dict[str, Any]:
        """Entries of the result, of sums over all pairs."""
        ...


class Recognition:
    """The shares of samples and of originals that a classifier takes for the image's class."""

    def __init__(self, features: FeatureNetwork, labels: torch.Tensor) -> None:
        self._features, self._labels = features, labels
        self._totals = torch.zeros(3, dtype=torch.float64)  # samples, originals, pairs

    def update(self, samples: torch.Tensor, originals: torch.Tensor, places: torch.Tensor) -> None:
        """See `PairScore`."""
        labels = self._labels[places]
        right = [predict_classes(self._features, images) == labels for images in (samples, originals)]
        self._totals += torch.tensor([float(right[0].sum()), float(right[1].sum()), float(len(labels))])

    def totals(self) -> torch.Tensor:
        """See `PairScore`."""
        return self._totals

    def result(self, totals: torch.Tensor) -> dict[str, Any]:
        """`recognised` and `recognised_originals`."""
        samples, originals, pairs = totals.tolist()
        return {"recognised": samples / pairs, "recognised_originals": originals / pairs}


def recognises(features: FeatureNetwork, dataset: ImageDataset) -> bool:
    """Whether the feature network is a classifier of the dataset's classes."""
    names = dataset.facts.class_names
    return bool(names) and features.classes == names


def recognition(features: FeatureNetwork | None, dataset: ImageDataset) -> list[PairScore]:
    """The score of recognition, where there can be one."""
    if features is None or not recognises(features, dataset):
        return []
    return [Recognition(features, torch.from_numpy(dataset.stored_labels))]
