"""Segmentation networks, which map images uint8 [B, C, H, W] to class ids [B, H, W]."""

from collections.abc import Callable

import torch
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.transforms.functional import normalize

from datasets_prep.label_maps.silhouettes import silhouette
from evaluation.features.protocol import FeatureNetwork, predict_classes
from evaluation.features.weights import read_weights_file
from options import UsageError
from runtime.weights import find_mismatch

__all__ = ["Segmenter", "load_segmenter", "silhouette_segmenter"]

Segmenter = Callable[[torch.Tensor], torch.Tensor]

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # normalization of torchvision's networks


def silhouette_segmenter(classifier: FeatureNetwork) -> Segmenter:
    """Create Fashion-MNIST's segmenter: it fills the garment's silhouette with the classifier's prediction plus one."""

    def segment(images: torch.Tensor) -> torch.Tensor:
        garments = predict_classes(classifier, images) + 1
        gray = images.float().mean(1).round().to(torch.uint8)
        return silhouette(gray) * garments.view(-1, 1, 1)

    return segment


def load_segmenter(path: str, classes: int, device: torch.device | str) -> Segmenter:
    """Load torchvision's deeplabv3_resnet50 for `classes` classes from a weights file.

    Raises:
        UsageError: the file is unreadable or holds the weights of another network.
    """
    weights = read_weights_file(path)
    network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=classes, aux_loss=False)
    own = {name: value for name, value in weights.items() if not name.startswith("aux_classifier.")}
    mismatch = find_mismatch(network.state_dict(), own)
    if any(mismatch):
        raise UsageError(
            f"--segmentation_weights {path}: expected a state dict of torchvision's deeplabv3_resnet50 for {classes} "
            f"classes; {mismatch}"
        )
    network.load_state_dict(own)
    network = network.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def segment(images: torch.Tensor) -> torch.Tensor:
        rgb = images.to(device).expand(-1, 3, -1, -1).float() / 255
        return network(normalize(rgb, IMAGENET_MEAN, IMAGENET_STD))["out"].argmax(1)

    return segment
