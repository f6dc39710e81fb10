"""Feature networks for tests. Their outputs are simple functions of the images."""

from collections.abc import Collection, Mapping
from typing import Self

import torch


class FakeFeatures:
    """Base class. A subclass lists its `outputs` and has a method of the same name, taking images, for each."""

    name, label, sha256, precision, device = "fake", "FD (fake)", "0" * 64, "fp32", "cpu"
    outputs: Mapping[str, int] = {"features": 3}
    classes: tuple[str, ...] = ()

    def __call__(self, images: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name)(images) for name in outputs}

    def exact(self) -> Self:
        return self


class Pixels(FakeFeatures):
    """Mean colors in [0, 1]."""

    name, label = "pixels", "FD (pixels)"

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3)) / 255


class MeanColors(FakeFeatures):
    """Mean colors in [0, 255]. Replaces Inception; the class is also the loader to register in FEATURES."""

    name, label = "inception", "FID"

    def __init__(self, options: object, device: object) -> None:
        pass

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))
