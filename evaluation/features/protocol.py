"""The interface of feature networks, which map images to named features.

Metrics compare the distributions of these features. Code outside this folder does not depend on the network.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

import torch

__all__ = ["PRECISIONS", "FeatureNetwork", "describe_features", "predict_classes"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FeatureNetwork(Protocol):
    """Computes named features of images.

    Attributes:
        name: network and layer, such as "inception_64".
        label: name of the Fréchet distance between its features, such as "FID".
        sha256: hash of the weights.
        precision: a key of PRECISIONS, the dtype of weights and activations.
        device: where the network runs.
        outputs: width of each output, by name. Every network has "features". Optional outputs are "spatial" (features that
            are not averaged over the image), "logits" and "probabilities".
        classes: class names for "probabilities", ordered by class id. Empty without that output.
    """

    name: str
    label: str
    sha256: str
    precision: str
    device: torch.device | str
    outputs: Mapping[str, int]
    classes: tuple[str, ...]

    def __call__(self, images: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        """Compute the requested outputs for a batch of images, skipping layers that they do not need.

        Args:
            images: uint8 [B, 1 or 3, H, W] on any device.
            outputs: keys of the attribute `outputs`.

        Returns:
            The requested outputs by name, each float32 [B, width] on the network's device.

        Raises:
            UsageError: the network does not accept images of this size.
        """
        ...

    def exact(self) -> "FeatureNetwork":
        """Return this network in float32, or itself if it already is in float32."""
        ...


def describe_features(features: FeatureNetwork) -> dict[str, str]:
    """Describe a feature network for results and statistics files. The precision is included unless it is float32."""
    described = {"name": features.name, "label": features.label, "sha256": features.sha256}
    return described if features.precision == "fp32" else {**described, "precision": features.precision}


def predict_classes(classifier: FeatureNetwork, images: torch.Tensor) -> torch.Tensor:
    """Predict the most probable class of each image.

    Args:
        classifier: a network with the output "probabilities".
        images: uint8 [B, C, H, W], of a size that the network accepts.

    Returns:
        Class ids int64 [B] on the CPU.
    """
    return classifier(images, {"probabilities"})["probabilities"].argmax(1).cpu()
