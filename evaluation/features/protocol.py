"""What every feature network offers: images in, named features out.

Scores compare the distributions of these features. Nothing outside this folder knows which network computes them.
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
        precision: a key of PRECISIONS, the type of weights and activations.
        device: where the network runs.
        outputs: width of each named output. Every network has "features". Further names are "spatial" (features that keep
            their place in the image), "logits" and "probabilities".
        classes: names of the classes that "probabilities" refers to, in the order of their ids; empty without that output.
    """

    name: str
    label: str
    sha256: str
    precision: str
    device: torch.device | str
    outputs: Mapping[str, int]
    classes: tuple[str, ...]

    def __call__(self, images: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        """Compute some outputs of images uint8 [B, 1 or 3, H, W], and nothing that they do not need.

        Args:
            images: of one size, on any device.
            outputs: keys of the attribute `outputs`.

        Returns:
            Just these outputs by name, each float32 [B, width] on the network's device.

        Raises:
            UsageError: the network does not take images of this size.
        """
        ...

    def exact(self) -> "FeatureNetwork":
        """The same network in float32: itself, if it already is."""
        ...


def describe_features(features: FeatureNetwork) -> dict[str, str]:
    """What results and statistics files record about their feature network; float32 goes unmentioned."""
    described = {"name": features.name, "label": features.label, "sha256": features.sha256}
    return described if features.precision == "fp32" else {**described, "precision": features.precision}


def predict_classes(classifier: FeatureNetwork, images: torch.Tensor) -> torch.Tensor:
    """The most probable class of each image uint8 [B, C, H, W], as ids int64 [B] on the CPU.

    Args:
        classifier: a network with the output "probabilities".
        images: of the size that it takes.
    """
    return classifier(images, {"probabilities"})["probabilities"].argmax(1).cpu()
