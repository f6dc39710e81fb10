"""The available feature networks and the options that select one.

To add a network, write a module with a class that implements `FeatureNetwork` and add a loader to FEATURES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from evaluation.features.fashion import FashionFeatures
from evaluation.features.inception import INCEPTION_DIMS, InceptionFeatures
from evaluation.features.protocol import PRECISIONS, FeatureNetwork
from options import UsageError, option
from runtime.precision import Machine

__all__ = ["FEATURES", "FeatureOptions", "Loader", "choose_features", "default_features", "load_features"]

Loader = Callable[["FeatureOptions", torch.device | str], FeatureNetwork]


def _inception(options: "FeatureOptions", device: torch.device | str) -> FeatureNetwork:
    return InceptionFeatures(options.feature_weights, device, options.dims, options.feature_precision)


def _dinov2(options: "FeatureOptions", device: torch.device | str) -> FeatureNetwork:
    from evaluation.features.dinov2 import DinoFeatures  # importing timm takes seconds

    return DinoFeatures(options.feature_weights, device, options.feature_precision)


def _fashion_mnist(options: "FeatureOptions", device: torch.device | str) -> FeatureNetwork:
    return FashionFeatures(options.feature_weights, device)


FEATURES: dict[str, Loader] = {"inception": _inception, "dinov2": _dinov2, "fashion_mnist": _fashion_mnist}


@dataclass(frozen=True)
class FeatureOptions:
    """Feature network."""

    on_resume: ClassVar = "freely"

    features: str | None = option(
        None,
        "network whose features are compared; default: fashion_mnist for that dataset, else inception (as in the FID)",
        choices=FEATURES,
    )
    feature_weights: str | None = option(
        None, "file with the network's weights; default: the original weights (downloaded once) or the bundled ones"
    )
    feature_precision: str = option(
        "fp32", "precision of inception and dinov2; bf16 is faster on GPUs, and the result reports its effect on the score",
        choices=PRECISIONS,
    )  # fmt: skip
    dims: int = option(
        INCEPTION_DIMS[-1],
        "number of inception features, which selects the layer: 64, 192, 768, or 2048 (used by the FID)",
    )


def default_features(dataset_name: str) -> str:
    """The name of the feature network that scores a dataset by default."""
    return "fashion_mnist" if dataset_name == "fashion_mnist" else "inception"


def choose_features(options: FeatureOptions, dataset_name: str, machine: Machine) -> FeatureNetwork:
    """Load the feature network named in `options`, or the dataset's default.

    Raises:
        UsageError: as `load_features` does.
    """
    return load_features(options.features or default_features(dataset_name), options, machine.device)


def load_features(name: str, options: FeatureOptions, device: torch.device | str) -> FeatureNetwork:
    """Load the feature network `name` (a key of FEATURES).

    Args:
        name: the network. `options.features` is ignored.
        options: weights file (None: the network's default weights), precision and layer.
        device: where the network runs.

    Raises:
        UsageError: an unknown name, or weights that are missing, damaged, for another network or impossible to download.
    """
    if name not in FEATURES:
        raise UsageError(f"--features {name}: expected one of {', '.join(FEATURES)}")
    return FEATURES[name](options, device)
