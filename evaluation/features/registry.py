"""The feature networks by name, and the options that choose one.

A new network is one module with a class that fulfils `FeatureNetwork`, and one entry in FEATURES.
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
    from evaluation.features.dinov2 import DinoFeatures  # timm's registry takes seconds to import

    return DinoFeatures(options.feature_weights, device, options.feature_precision)


def _fashion_mnist(options: "FeatureOptions", device: torch.device | str) -> FeatureNetwork:
    return FashionFeatures(options.feature_weights, device)


FEATURES: dict[str, Loader] = {"inception": _inception, "dinov2": _dinov2, "fashion_mnist": _fashion_mnist}


@dataclass(frozen=True)
class FeatureOptions:
    """Feature network of the scores."""

    on_resume: ClassVar = "freely"

    features: str | None = option(
        None,
        "feature network; default: fashion_mnist for that dataset, else inception (whose score is the FID)",
        choices=FEATURES,
    )
    feature_weights: str | None = option(
        None, "file of the network's weights; default: the published ones (downloaded once), or the bundled ones"
    )
    feature_precision: str = option(
        "fp32", "precision of inception and dinov2; bf16 is faster on GPUs and says how much it changes the score",
        choices=PRECISIONS,
    )  # fmt: skip
    dims: int = option(
        INCEPTION_DIMS[-1], "layer of inception, by its number of features: 64, 192, 768, or 2048 (the FID's)"
    )


def default_features(dataset_name: str) -> str:
    """The feature network that scores a dataset when the user names none."""
    return "fashion_mnist" if dataset_name == "fashion_mnist" else "inception"


def choose_features(options: FeatureOptions, dataset_name: str, machine: Machine) -> FeatureNetwork:
    """Load the feature network that `options` names, else the dataset's default; errors as in `load_features`."""
    return load_features(options.features or default_features(dataset_name), options, machine.device)


def load_features(name: str, options: FeatureOptions, device: torch.device | str) -> FeatureNetwork:
    """Load the feature network `name` (a key of FEATURES).

    Args:
        name: takes precedence over `options.features`.
        options: weights file (None: the network's own weights), precision and layer.
        device: where the network runs.

    Raises:
        UsageError: an unknown name, or weights that are missing, damaged, foreign or cannot be downloaded.
    """
    if name not in FEATURES:
        raise UsageError(f"unknown features {name!r}: expected one of {', '.join(FEATURES)} (--features)")
    return FEATURES[name](options, device)
