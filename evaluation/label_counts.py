"""Label counts of scored images, and the fraction of images that a classifier assigns to their label."""

from collections.abc import Sequence
from typing import Any

import torch

from evaluation.features.protocol import FeatureNetwork, predict_classes
from runtime.distributed import Processes

__all__ = ["LabelCounts"]

LISTED_CLASSES = 100  # with more classes, a result holds only the smallest and the largest count


class LabelCounts:
    """Counts labels and correctly classified images.

    Images are classified only if the feature network is a classifier for exactly these classes.

    Args:
        features: the feature network.
        class_names: names of the labels, ordered by class id. Empty if unknown.
    """

    def __init__(self, features: FeatureNetwork, class_names: Sequence[str]) -> None:
        self._features, self._names = features, tuple(class_names)
        self._classifies = bool(class_names) and self._names == features.classes
        self._counts = torch.zeros(0, dtype=torch.long)
        self._recognized = 0

    def update(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Add images uint8 [B, C, H, W] and their class ids [B]. Without labels, this does nothing."""
        if labels is None:
            return
        self._add(torch.bincount(labels))
        if self._classifies:
            self._recognized += int((predict_classes(self._features, images) == labels).sum())

    def merge_all(self, processes: Processes) -> None:
        """Sum the counts of all processes in the main process."""
        shares = processes.gather((self._counts, self._recognized))
        for counts, recognized in shares[1:]:
            self._add(counts)
            self._recognized += recognized

    def result(self) -> dict[str, Any]:
        """Entries for a result: "labels", the counts, and "recognised", the fraction of images assigned to their label.

        With more than LISTED_CLASSES classes, "labels" holds only the number of classes and the extreme counts. "recognised" is
        missing if images are not classified, and both are missing without labels.
        """
        counts = self._counts.tolist()
        if not counts:
            return {}
        if len(counts) <= LISTED_CLASSES:
            names = self._names if len(self._names) == len(counts) else [str(label) for label in range(len(counts))]
            result: dict[str, Any] = {"labels": dict(zip(names, counts, strict=True))}
        else:
            result = {"labels": {"classes": len(counts), "fewest": min(counts), "most": max(counts)}}
        return result | ({"recognised": self._recognized / sum(counts)} if self._classifies else {})

    def _add(self, counts: torch.Tensor) -> None:
        longer, shorter = sorted((counts, self._counts), key=len, reverse=True)
        self._counts = longer.clone()
        self._counts[: len(shorter)] += shorter
