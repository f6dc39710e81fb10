"""Scores of samples paired with their images, accumulated batch by batch; and one of them, recognition by a classifier."""

from typing import Any, Protocol

import torch

from datasets_prep.datasets import ImageDataset
from evaluation.features.protocol import FeatureNetwork, predict_classes

__all__ = ["PairScore", "Recognition", "recognises", "recognition"]


class PairScore(Protocol):
    """A score of samples paired with their images, accumulated batch by batch."""

    def update(self, samples: torch.Tensor, originals: torch.Tensor, places: torch.Tensor) -> None:
        """Add samples and images, both uint8 [B, C, H, W], of the images with numbers `places` [B]."""
        ...

    def totals(self) -> torch.Tensor:
        """Sums so far, float64; sums of several processes may be added."""
        ...

    def result(self, totals: torch.Tensor) -> dict[str, Any]:
        """Entries of the result, from the sums over all pairs."""
        ...


class Recognition:
    """The shares of samples and of originals that a classifier assigns to the image's class.

    Args:
        features: the classifier.
        labels: class ids of all images [N].
    """

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
    """The recognition score in a list, which is empty if the feature network is not such a classifier."""
    if features is None or not recognises(features, dataset):
        return []
    return [Recognition(features, torch.from_numpy(dataset.stored_labels))]
