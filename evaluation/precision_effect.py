"""The effect of a feature network's reduced precision on the Fréchet distance, measured on the first images of a set."""

from typing import Any

import torch

from evaluation.features.protocol import FeatureNetwork
from evaluation.metrics import frechet_distance
from evaluation.summary import Gatherer, Summary
from runtime.messages import show

__all__ = ["PrecisionEffect"]

COMPARED = 1000  # images


class PrecisionEffect:
    """Computes features of the first COMPARED images in both precisions. Does nothing for a float32 network."""

    def __init__(self, features: FeatureNetwork) -> None:
        exact = features.precision == "fp32"
        networks = {} if exact else {features.precision: features, "fp32": features.exact()}
        self._gatherers = {name: Gatherer(network, ("moments",)) for name, network in networks.items()}

    def update(self, images: torch.Tensor) -> None:
        """Add images uint8 [B, C, H, W]. Images after the first COMPARED are ignored."""
        for gatherer in self._gatherers.values():
            if gatherer.count < COMPARED:
                gatherer.update(images[: COMPARED - gatherer.count])

    def result(self, reference: Summary) -> dict[str, Any]:
        """Print and return the result's entry "feature_precision_effect": the distance from `reference` at each precision."""
        if not self._gatherers or reference.statistics is None:
            return {}
        known = {name: gatherer.summary().statistics for name, gatherer in self._gatherers.items()}
        values = {name: frechet_distance(s, reference.statistics) for name, s in known.items() if s is not None}
        images = next(iter(self._gatherers.values())).count
        show(f"Frechet distance of the first {images} images at each --feature_precision: {values}")
        return {"feature_precision_effect": {"images": images, **values}}
