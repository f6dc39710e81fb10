"""Small residual classifier for 28 x 28 grayscale images. Its penultimate layer provides features for scoring.

A stem precedes one level per further width. Each level is a stride-2 convolution, which halves the image, and a residual block
(He et al. 2016). The features are the last level's activations, averaged over the image. The header of the weights file
records the architecture and the class names.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from options import UsageError, as_json
from runtime.files import atomic_path
from runtime.weights import check_finite

__all__ = ["SIDE", "FashionClassifier", "load_classifier", "save_classifier"]

SIDE = 28  # image side in pixels


class FashionClassifier(nn.Module):
    """Classifier for pixels [B, 1, 28, 28] in [-1, 1].

    Args:
        widths: channels of the stem and of each level. The last width is the number of features.
        classes: names of the classes, ordered by class id.
    """

    def __init__(self, widths: tuple[int, ...], classes: tuple[str, ...]) -> None:
        super().__init__()
        self.widths, self.classes, self.dims = tuple(widths), tuple(classes), widths[-1]
        layers: list[nn.Module] = [_convolution(1, widths[0]), nn.ReLU()]
        for before, after in itertools.pairwise(widths):
            layers += [_convolution(before, after, stride=2), nn.ReLU(), _Residual(after)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.dims, len(classes))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map pixels [B, 1, 28, 28] in [-1, 1] to non-negative features [B, dims]."""
        return self.body(pixels).mean((2, 3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map pixels [B, 1, 28, 28] in [-1, 1] to logits [B, K]."""
        return self.head(self.features(pixels))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x + self.second(functional.relu(self.first(x))))


def _convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after))


def save_classifier(network: FashionClassifier, path: str | Path, facts: Mapping[str, Any]) -> None:
    """Write the weights as float16 safetensors, with widths, classes and the JSON-serializable `facts` in the header."""
    weights = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in network.state_dict().items()
    }
    description = {"widths": network.widths, "classes": network.classes, **facts}
    header = {key: json.dumps(as_json(value)) for key, value in description.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(weights, header))


def load_classifier(path: str | Path) -> FashionClassifier:
    """Load a file written by `save_classifier`, in float32 and evaluation mode.

    Raises:
        UsageError: the file is missing, damaged, holds another network, or has weights that are not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        network = FashionClassifier(tuple(json.loads(header["widths"])), tuple(json.loads(header["classes"])))
        network.load_state_dict(weights)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"cannot load {path}: {reason}; expected a classifier saved by train_classifier.py") from error
    check_finite(weights, path)
    return network.eval().requires_grad_(False)
