"""Small classifiers for 28 x 28 grayscale images, by name in ARCHITECTURES. The penultimate layer has the scoring features.

residual: a stem precedes one level per further width. Each level is a stride-2 convolution, which halves the image, and a
residual block (He et al. 2016). The features are the last level's activations, averaged over the image.

patches: a transformer on patches of 7 x 7 pixels (Dosovitskiy et al. 2021), with one block per width. The features are the
normalized tokens, averaged over the image. It shares no layer with the other one, so it can check its verdicts.

The header of the weights file records the architecture and the class names.
"""

import itertools
import json
from collections.abc import Callable, Mapping
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

__all__ = [
    "ARCHITECTURES",
    "SIDE",
    "FashionClassifier",
    "load_classifier",
    "save_classifier",
]

SIDE = 28  # image side in pixels
PATCH = 7  # side of a patch in pixels
HEAD_WIDTH = 16  # of an attention head


class FashionClassifier(nn.Module):
    """Classifier for pixels [B, 1, 28, 28] in [-1, 1]: a body with features, and a linear head.

    Args:
        architecture: key of ARCHITECTURES.
        widths: see ARCHITECTURES. The last width is the number of features.
        classes: names of the classes, ordered by class id.

    Raises:
        UsageError: the architecture does not exist in these widths.
    """

    def __init__(self, widths: tuple[int, ...], classes: tuple[str, ...], architecture: str = "residual") -> None:
        super().__init__()
        self.architecture, self.widths, self.classes = architecture, tuple(widths), tuple(classes)
        self.dims = widths[-1]
        self.body = ARCHITECTURES[architecture](self.widths)
        self.head = nn.Linear(self.dims, len(classes))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map pixels [B, 1, 28, 28] in [-1, 1] to features [B, dims]."""
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


def _residual_levels(widths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = [_convolution(1, widths[0]), nn.ReLU()]
    for before, after in itertools.pairwise(widths):
        layers += [_convolution(before, after, stride=2), nn.ReLU(), _Residual(after)]
    return nn.Sequential(*layers)


class _PatchTransformer(nn.Module):
    """Tokens of patches as a map [B, D, 4, 4]."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        width = widths[0]
        if set(widths) != {width} or width % HEAD_WIDTH:
            given = " ".join(map(str, widths))
            raise UsageError(
                f"--architecture patches: expected --widths with the same multiple of {HEAD_WIDTH} for every block, such as "
                f"64 64 64 64, but {given} was given"
            )
        self.patches = nn.Conv2d(1, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2, width))
        block = nn.TransformerEncoderLayer(
            width, width // HEAD_WIDTH, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, len(widths), nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patches(pixels)
        tokens = self.blocks(patches.flatten(2).mT + self.positions)  # [B, L, D]
        return tokens.mT.unflatten(2, patches.shape[2:])


# Bodies: widths -> a module from pixels to activations [B, widths[-1], h, w].
ARCHITECTURES: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "residual": _residual_levels,
    "patches": _PatchTransformer,
}


def _convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after))


def save_classifier(network: FashionClassifier, path: str | Path, facts: Mapping[str, Any]) -> None:
    """Write the weights as float16 safetensors, with widths, classes and the JSON-serializable `facts` in the header."""
    weights = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in network.state_dict().items()
    }
    description = {"widths": network.widths, "classes": network.classes, "architecture": network.architecture, **facts}
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
        described = {key: json.loads(header[key]) for key in ("widths", "classes")}
        architecture = json.loads(header.get("architecture", '"residual"'))
        network = FashionClassifier(tuple(described["widths"]), tuple(described["classes"]), architecture)
        network.load_state_dict(weights)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"cannot load {path}: {reason}; expected a classifier saved by train_classifier.py") from error
    check_finite(weights, path)
    return network.eval().requires_grad_(False)
