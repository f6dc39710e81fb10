"""Networks that turn images into the features whose distributions are compared.

`inception` is the InceptionV3 of pip's pytorch_fid (2048 features): the distance between its features is the FID.
`fashion_mnist` is the classifier shipped with this repository; its distance is never called FID.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch

from evaluation.classifier import SIDE, load_classifier
from models.autoencoder import images_to_pixels, weights_hash
from options import UsageError, option
from runtime.precision import Machine

__all__ = [
    "FEATURES",
    "FashionFeatures",
    "FeatureNetwork",
    "FeatureOptions",
    "InceptionFeatures",
    "choose_features",
    "default_features",
    "load_features",
]

FASHION_WEIGHTS = Path(__file__).parents[1] / "pretrained" / "fashion_mnist_classifier.safetensors"


@dataclass(frozen=True)
class FeatureOptions:
    """Feature network of the scores."""

    features: str | None = option(
        None,
        "inception or fashion_mnist; default: fashion_mnist for that dataset, else inception (whose score is the FID)",
        choices=("inception", "fashion_mnist"),
    )
    feature_weights: str | None = option(
        None, "file of the network's weights; default: the published ones (downloaded once), or the bundled ones"
    )


class FeatureNetwork(Protocol):
    """Images uint8 [B, C, H, W] to features float32 [B, dims].

    `label` is what a distance of such features is called, `name` the key in FEATURES, `sha256` the weights' hash.
    """

    label: str
    name: str
    dims: int
    sha256: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images."""
        ...


class InceptionFeatures:
    """The final average pooling of pytorch_fid's InceptionV3; grey images are repeated to RGB."""

    label, name, dims = "FID", "inception", 2048

    def __init__(self, weights_file: str | None, device: torch.device | str) -> None:
        self.device = device
        self.network = _build_inception(weights_file).to(device).to(memory_format=torch.channels_last)
        self.sha256 = weights_hash(self.network.state_dict())

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, 1 or 3, H, W] of any size to features float32 [B, 2048]."""
        images = images.to(self.device).expand(-1, 3, -1, -1)
        return self.network(images.float() / 255)[0].flatten(1)


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


FEATURES: dict[str, Callable[[str | None, torch.device | str], FeatureNetwork]] = {
    "inception": InceptionFeatures,
    "fashion_mnist": FashionFeatures,
}


def default_features(dataset_name: str) -> str:
    """The feature network that scores a dataset when none is asked for."""
    return "fashion_mnist" if dataset_name == "fashion_mnist" else "inception"


def choose_features(options: FeatureOptions, dataset_name: str, machine: Machine) -> FeatureNetwork:
    """The feature network that `options` asks for, else the dataset's default; errors as `load_features`."""
    return load_features(options.features or default_features(dataset_name), options.feature_weights, machine.device)


def load_features(name: str, weights_file: str | None, device: torch.device | str) -> FeatureNetwork:
    """The feature network `name`, with the weights in `weights_file` or, when None, its own.

    Raises:
        UsageError: an unknown name, or weights that are missing, damaged, foreign or cannot be downloaded.
    """
    if name not in FEATURES:
        raise UsageError(f"unknown features {name!r}: expected one of {', '.join(FEATURES)} (--features)")
    return FEATURES[name](weights_file, device)


def _build_inception(weights_file: str | None) -> torch.nn.Module:
    from pytorch_fid import inception  # pip's: it imports all of torchvision

    url = inception.FID_WEIGHTS_URL
    weights = _download(url) if weights_file is None else _read_state_dict(weights_file)
    # The constructor downloads unconditionally; for its duration it gets the weights that are already here.
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=weights):
        try:
            return inception.InceptionV3().eval().requires_grad_(False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"--feature_weights {weights_file} does not fit pytorch_fid's InceptionV3: expected the state dict "
                f"published at {url}, but: {reason}"
            ) from error


def _download(url: str) -> dict[str, torch.Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"cannot download the Inception weights ({error}): fetch {url} on another machine and pass it as "
            "--feature_weights FILE"
        ) from error


def _read_state_dict(path: str) -> dict[str, Any]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"cannot read --feature_weights {path}: {reason}") from error
    if not isinstance(weights, dict):
        raise UsageError(f"--feature_weights {path}: expected a state dict, but found {type(weights).__name__}")
    return weights
