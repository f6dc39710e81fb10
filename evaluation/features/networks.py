"""Networks that turn images into the features whose distributions are compared.

`inception` is the InceptionV3 of pip's pytorch_fid (2048 features): the distance between its features is the FID.
`dinov2` is timm's DINOv2 ViT-L/14. `fashion_mnist` is the classifier shipped with this repository; its distance is never
called FID.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from evaluation.features.classifier import SIDE, load_classifier
from evaluation.features.inception import INCEPTION_DIMS, InceptionFeatures
from models.autoencoders.pixels import images_to_pixels
from options import UsageError, option
from runtime.precision import Machine
from runtime.torch_files import weights_hash

__all__ = [
    "FEATURES",
    "FashionFeatures",
    "FeatureNetwork",
    "FeatureOptions",
    "choose_features",
    "default_features",
    "describe_features",
    "extract",
    "load_features",
]

FASHION_WEIGHTS = Path(__file__).parents[2] / "pretrained" / "fashion_mnist_classifier.safetensors"


@dataclass(frozen=True)
class FeatureOptions:
    """Feature network of the scores."""

    features: str | None = option(
        None,
        "inception, dinov2 or fashion_mnist; default: fashion_mnist for that dataset, else inception (whose score is the FID)",
        choices=("inception", "dinov2", "fashion_mnist"),
        on_resume="freely",
    )
    feature_weights: str | None = option(
        None,
        "file of the network's weights; default: the published ones (downloaded once), or the bundled ones",
        on_resume="freely",
    )
    feature_precision: str = option(
        "fp32", "precision of inception and dinov2; bf16 is faster on GPUs and says how much it changes the score",
        choices=("fp32", "bf16"),
    on_resume="freely")  # fmt: skip
    dims: int = option(
        INCEPTION_DIMS[-1],
        "layer of inception, by its number of features: 64, 192, 768, or 2048 (the FID's)",
        on_resume="freely",
    )


class FeatureNetwork(Protocol):
    """Images uint8 [B, C, H, W] to features float32 [B, dims].

    `label` is what a distance of such features is called, `name` tells network and layer, `sha256` is the weights' hash.
    A network with further outputs also has `outputs`, their names, and `extract`; see `InceptionFeatures`.
    """

    label: str
    name: str
    dims: int
    sha256: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images."""
        ...


class FashionFeatures:
    """The penultimate layer of the classifier of Fashion-MNIST; colours are averaged to grey."""

    label, name = "FD (fashion-mnist features)", "fashion_mnist"

    def __init__(self, weights_file: str | None, device: torch.device | str) -> None:
        self.device = device
        self.network = load_classifier(weights_file or FASHION_WEIGHTS).to(device).to(memory_format=torch.channels_last)
        self.dims, self.classes = self.network.dims, self.network.classes
        self.sha256 = weights_hash(self.network.state_dict())

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, C, 28, 28] to features float32 [B, dims].

        Raises:
            UsageError: images of another size.
        """
        return self.network.features(self._pixels(images))

    @torch.inference_mode()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, C, 28, 28] to the classes' probabilities, float32 [B, K]; argmax(1) is the prediction."""
        return self.network(self._pixels(images)).softmax(1)

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[2:] != (SIDE, SIDE):
            raise UsageError(
                f"the features fashion_mnist take {SIDE} x {SIDE} images, but these are "
                f"{images.shape[3]} x {images.shape[2]}; use --features inception"
            )
        return images_to_pixels(images.to(self.device)).mean(1, keepdim=True)


def _inception(options: FeatureOptions, device: torch.device | str) -> FeatureNetwork:
    return InceptionFeatures(options.feature_weights, device, options.dims, options.feature_precision)


def _dinov2(options: FeatureOptions, device: torch.device | str) -> FeatureNetwork:
    from evaluation.features.dinov2 import DinoFeatures  # timm's registry takes seconds to import

    return DinoFeatures(options.feature_weights, device, options.feature_precision)


def _fashion_mnist(options: FeatureOptions, device: torch.device | str) -> FeatureNetwork:
    return FashionFeatures(options.feature_weights, device)


FEATURES: dict[str, Callable[[FeatureOptions, torch.device | str], FeatureNetwork]] = {
    "inception": _inception,
    "dinov2": _dinov2,
    "fashion_mnist": _fashion_mnist,
}


def default_features(dataset_name: str) -> str:
    """The feature network that scores a dataset when none is asked for."""
    return "fashion_mnist" if dataset_name == "fashion_mnist" else "inception"


def choose_features(options: FeatureOptions, dataset_name: str, machine: Machine) -> FeatureNetwork:
    """The feature network that `options` asks for, else the dataset's default; errors as `load_features`."""
    return load_features(options.features or default_features(dataset_name), options, machine.device)


def load_features(name: str, options: FeatureOptions, device: torch.device | str) -> FeatureNetwork:
    """The feature network `name`, with the weights in `options.feature_weights` or, when None, its own.

    Raises:
        UsageError: an unknown name, or weights that are missing, damaged, foreign or cannot be downloaded.
    """
    if name not in FEATURES:
        raise UsageError(f"unknown features {name!r}: expected one of {', '.join(FEATURES)} (--features)")
    return FEATURES[name](options, device)


def extract(features: FeatureNetwork, images: torch.Tensor, wanted: frozenset[str]) -> dict[str, torch.Tensor]:
    """The outputs `wanted` of a feature network, each [B, ...]; "features" are those that every network has.

    Raises:
        UsageError: the network has no such output.
    """
    if wanted <= {"features"}:
        return {"features": features(images)}
    missing = wanted - set(getattr(features, "outputs", ("features",)))
    if missing:
        raise UsageError(
            f"the features {features.name} have no {' or '.join(sorted(missing))}, which the metrics sfid and is need: "
            "use --features inception at --dims 2048, or leave those metrics out"
        )
    return features.extract(images)  # type: ignore[attr-defined]


def describe_features(features: FeatureNetwork) -> dict[str, str]:
    """What a result must say about the network behind it."""
    described = {"name": features.name, "label": features.label, "sha256": features.sha256}
    precision = getattr(features, "precision", "fp32")
    return described if precision == "fp32" else {**described, "precision": precision}
