"""Scores of samples paired with their images, and one such score: recognition by a classifier."""

from typing import Any, Protocol

import torch

from datasets_prep.datasets import ImageDataset
from evaluation.features.protocol import FeatureNetwork, predict_classes

__all__ = ["PairScore", "Recognition", "recognises", "recognition"]


class PairScore(Protocol):
    """A score of samples paired with their images, accumulated batch by batch."""

    def update(self, samples: torch.Tensor, originals: torch.Tensor, image_indices: torch.Tensor) -> None:
        """Add samples and their images `image_indices` [B], both uint8 [B, C, H, W]."""
        ...

    def totals(self) -> torch.Tensor:
        """The sums so far, float64. The sums of several processes may be added."""
        ...

    def result(self, totals: torch.Tensor) -> dict[str, Any]:
        """Compute the result's entries from the sums over all pairs."""
        ...


class Recognition:
    """The shares of samples and of originals that a classifier assigns to the image's class.

    Args:
        features: the classifier.
        labels: class ids [N] of all images.
    """

    def __init__(self, features: FeatureNetwork, labels: torch.Tensor) -> None:
        self._features, self._labels = features, labels
        # Numbers of recognized samples, recognized originals, and pairs.
        self._totals = torch.zeros(3, dtype=torch.float64)

    def update(self, samples: torch.Tensor, originals: torch.Tensor, image_indices: torch.Tensor) -> None:
        """See `PairScore`."""
        labels = self._labels[image_indices]
        correct = [predict_classes(self._features, images) == labels for images in (samples, originals)]
        self._totals += torch.tensor([float(correct[0].sum()), float(correct[1].sum()), float(len(labels))])

    def totals(self) -> torch.Tensor:
        """See `PairScore`."""
        return self._totals

    def result(self, totals: torch.Tensor) -> dict[str, Any]:
        """The entries `recognised` and `recognised_originals`."""
        samples, originals, pairs = totals.tolist()
        return {"recognised": samples / pairs, "recognised_originals": originals / pairs}


def recognises(features: FeatureNetwork, dataset: ImageDataset) -> bool:
    """Whether the feature network is a classifier of the dataset's classes."""
    names = dataset.facts.class_names
    return bool(names) and features.classes == names


def recognition(features: FeatureNetwork | None, dataset: ImageDataset) -> list[PairScore]:
    """A list with the recognition score, or an empty list if the feature network does not classify the dataset's classes."""
    if features is None or not recognises(features, dataset):
        return []
    return [Recognition(features, torch.from_numpy(dataset.stored_labels))]
