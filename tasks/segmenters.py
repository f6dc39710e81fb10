"""Segmentation networks: images uint8 [B, C, H, W] to class ids [B, H, W]."""

from collections.abc import Callable

import torch
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.transforms.functional import normalize

from checkpoints.state_dicts import find_mismatch
from datasets_prep.label_maps.silhouettes import silhouette
from evaluation.features.protocol import FeatureNetwork, predict_classes
from evaluation.features.weights import read_weights_file
from options import UsageError

__all__ = ["Segmenter", "load_segmenter", "silhouette_segmenter"]

Segmenter = Callable[[torch.Tensor], torch.Tensor]

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # as torchvision's networks expect them


def silhouette_segmenter(classifier: FeatureNetwork) -> Segmenter:
    """The segmenter of Fashion-MNIST: the garment's silhouette, filled with the class found by a classifier plus one."""

    def segment(images: torch.Tensor) -> torch.Tensor:
        garments = predict_classes(classifier, images) + 1
        grey = images.float().mean(1).round().to(torch.uint8)
        return silhouette(grey) * garments.view(-1, 1, 1)

    return segment


def load_segmenter(path: str, classes: int, device: torch.device | str) -> Segmenter:
    """torchvision's deeplabv3_resnet50 for `classes` classes, with weights from a file.

    Raises:
        UsageError: the file is unreadable or holds the weights of another network.
    """
    weights = read_weights_file(path)
    network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=classes, aux_loss=False)
    own = {name: value for name, value in weights.items() if not name.startswith("aux_classifier.")}
    mismatch = find_mismatch(network.state_dict(), own)
    if any(mismatch):
        raise UsageError(
            f"--segmentation_weights {path}: no state dict of torchvision's deeplabv3_resnet50 for {classes} classes; "
            f"{mismatch}"
        )
    network.load_state_dict(own)
    network = network.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def segment(images: torch.Tensor) -> torch.Tensor:
        colours = images.to(device).expand(-1, 3, -1, -1).float() / 255
        return network(normalize(colours, IMAGENET_MEAN, IMAGENET_STD))["out"].argmax(1)

    return segment
