"""Features of the bundled Fashion-MNIST classifier. Their Fréchet distance is never called FID."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from evaluation.features.classifier import SIDE, load_classifier
from models.autoencoders.pixels import images_to_pixels
from options import UsageError
from runtime.weights import weights_hash

__all__ = ["FASHION_WEIGHTS", "FashionFeatures"]

FASHION_WEIGHTS = Path(__file__).parents[2] / "pretrained" / "fashion_mnist_classifier.safetensors"


class FashionFeatures:
    """The classifier's penultimate layer and class probabilities. Color channels are averaged to grayscale.

    Args:
        weights_file: file written by `save_classifier`. None: the bundled file.
        device: where the network runs.
    """

    name, label, precision = "fashion_mnist", "FD (fashion-mnist features)", "fp32"

    def __init__(self, weights_file: str | None, device: torch.device | str) -> None:
        self.device = device
        self.network = load_classifier(weights_file or FASHION_WEIGHTS).to(device).to(memory_format=torch.channels_last)
        self.classes = self.network.classes
        self.outputs: Mapping[str, int] = {"features": self.network.dims, "probabilities": len(self.classes)}
        self.sha256 = weights_hash(self.network.state_dict())

    def exact(self) -> "FashionFeatures":
        """Return the network itself, which computes in float32."""
        return self

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        """Compute `outputs` for images uint8 [B, C, 28, 28].

        Raises:
            UsageError: the images have another size.
        """
        found = {"features": self.network.features(self._pixels(images))}
        if "probabilities" in outputs:
            found["probabilities"] = self.network.head(found["features"]).softmax(1)
        return {name: found[name] for name in outputs}

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[2:] != (SIDE, SIDE):
            raise UsageError(
                f"--features fashion_mnist needs {SIDE} x {SIDE} images, but these are "
                f"{images.shape[3]} x {images.shape[2]}; use --features inception"
            )
        return images_to_pixels(images.to(self.device)).mean(1, keepdim=True)
