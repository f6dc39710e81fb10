"""How often each label occurs among scored images, and how many images a classifier assigns to their label."""

from collections.abc import Sequence
from typing import Any

import torch

from evaluation.features.protocol import FeatureNetwork, predict_classes
from runtime.distributed import Processes

__all__ = ["LabelCounts"]

LISTED_CLASSES = 100  # with more, a result holds only the smallest and the largest count


class LabelCounts:
    """Counts labels. If the feature network is a classifier of just these classes, it also counts the images it recognises.

    Args:
        features: the feature network.
        class_names: names of the labels, in the order of their ids; empty: unknown.
    """

    def __init__(self, features: FeatureNetwork, class_names: Sequence[str]) -> None:
        self._features, self._names = features, tuple(class_names)
        self._classifies = bool(class_names) and self._names == features.classes
        self._counts = torch.zeros(0, dtype=torch.long)
        self._recognised = 0

    def update(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Add images uint8 [B, C, H, W] and their class ids [B]; None: there are no labels."""
        if labels is None:
            return
        self._add(torch.bincount(labels))
        if self._classifies:
            self._recognised += int((predict_classes(self._features, images) == labels).sum())

    def merge_all(self, processes: Processes) -> None:
        """Collect in the main process the counts of all processes."""
        shares = processes.gather((self._counts, self._recognised))
        for counts, recognised in shares[1:]:
            self._add(counts)
            self._recognised += recognised

    def result(self) -> dict[str, Any]:
        """Entries of a result: "labels", and "recognised", the share of images assigned to their label."""
        counts = self._counts.tolist()
        if not counts:
            return {}
        if len(counts) <= LISTED_CLASSES:
            names = self._names if len(self._names) == len(counts) else [str(label) for label in range(len(counts))]
            result: dict[str, Any] = {"labels": dict(zip(names, counts, strict=True))}
        else:
            result = {"labels": {"classes": len(counts), "fewest": min(counts), "most": max(counts)}}
        return result | ({"recognised": self._recognised / sum(counts)} if self._classifies else {})

    def _add(self, counts: torch.Tensor) -> None:
        longer, shorter = sorted((counts, self._counts), key=len, reverse=True)
        self._counts = longer.clone()
        self._counts[: len(shorter)] += shorter
