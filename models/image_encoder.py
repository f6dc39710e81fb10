"""Frozen image encoders of timm, whose features a network's tokens are aligned to in training (REPA, arXiv:2410.06940).

Images are resized so that the encoder has one feature per token of the network: for DINOv2 with patches of 14 pixels and a
network of 16 x 16 tokens, to 224 x 224 pixels, as in REPA. A vision transformer gives its patch tokens after the final norm,
and a convolutional network its last map.
"""

import hashlib
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn
from torch.nn.functional import interpolate

from models.autoencoders.hub import UnreachableHubError, check_hub
from models.autoencoders.protocol import AutoencoderFacts
from options import UsageError
from runtime.torch_files import read_tensors
from runtime.weights import check_finite, weights_hash

__all__ = ["ImageEncoder", "load_encoder"]

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # names that timm looks for on the hub


class ImageEncoder:
    """A frozen network that maps images to features on the grid of a network's tokens; an `Encoder`, so caches can hold them.

    Args:
        name: timm's name of the model.
        network: the model, without a classifier.
        grid: tokens per side.
        image_size: side of the images in pixels, a multiple of `grid`.

    Raises:
        UsageError: the model has no feature at every position of the grid.
    """

    is_pixel_space = False

    def __init__(self, name: str, network: nn.Module, grid: int, image_size: int) -> None:
        self.name = name
        self.network = network.eval().requires_grad_(False)
        self.grid = grid
        self.factor = image_size // grid
        self.moment_channels = feature_width(network)
        self.side = grid * _patch_of(network)
        facts: Any = network.pretrained_cfg
        self._mean, self._std = (torch.tensor(facts[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        found = tuple(self.encode(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)).shape)
        if found != (expected := (1, self.moment_channels, grid, grid)):
            raise UsageError(
                f"--align_encoder {name} gives features of the shape {found[1:]} for images of {self.side} pixels, but the "
                f"network's tokens need {expected[1:]}: choose a vision transformer, or another network with a map of features"
            )

    def to(self, device: torch.device | str) -> "ImageEncoder":
        """Move the weights to `device`; returns the encoder itself."""
        self.network.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def describe(self) -> AutoencoderFacts:
        """The model's name, and a hash of its weights and of the side to which images are resized."""
        weights = weights_hash(self.network.state_dict())
        return AutoencoderFacts(self.name, hashlib.sha256(f"{weights} {self.side}".encode()).hexdigest())

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Features [B, d, rows, columns], one per token, of images uint8 [B, 1 or 3, H, W]."""
        pixels = images.to(self._mean.device).float() / 255
        resized = interpolate(pixels, size=(self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        normal = (resized.clamp(0, 1).expand(-1, 3, -1, -1) - self._mean) / self._std
        features = self.network.forward_features(normal).float()  # type: ignore[operator]
        if features.ndim == 3:  # a transformer's tokens, after its class token and registers
            features = features[:, getattr(self.network, "num_prefix_tokens", 0) :]
            return features.transpose(1, 2).unflatten(2, (self.grid, -1))
        return features if features.shape[1] == self.moment_channels else features.permute(0, 3, 1, 2)


def load_encoder(name: str, file: str = "") -> nn.Module:
    """The timm model `name`, with the weights in `file`, or with its published ones, which are downloaded.

    Raises:
        UsageError: timm does not know the model, its weights cannot be downloaded, or the file does not fit.
    """
    try:
        if not file:
            _check_hub(name)
        network = _create(name, pretrained=not file)
    except Exception as error:  # timm and the hub raise various errors
        root = error.__cause__ if isinstance(error, UnreachableHubError) else error
        reason = " ".join(str(root).split())[:200]
        raise UsageError(
            f"cannot load --align_encoder {name} ({reason}): expected the name of a timm model, and without network access its "
            "weights as --align_encoder_weights FILE"
        ) from error
    if file:
        _load(network, file, name)
    return network


def feature_width(network: nn.Module) -> int:
    """Width d of a timm model's features."""
    return int(network.num_features)  # type: ignore[arg-type]


def _check_hub(name: str) -> None:
    """Check that the hub answers if the published weights of a timm model must be downloaded."""
    published = get_pretrained_cfg(name)
    if published is not None and published.hf_hub_id:
        check_hub(published.hf_hub_id, WEIGHT_FILES)


def _create(name: str, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:  # only vision transformers have a table of positions, which must fit the image
        return timm.create_model(name, pretrained=pretrained, num_classes=0)


def _load(network: nn.Module, file: str, name: str) -> None:
    """Load a file of weights, in timm's format or, for vision transformers, in one that timm converts."""
    weights = read_tensors(file)
    try:
        if isinstance(network, VisionTransformer):
            weights = checkpoint_filter_fn(weights, network)
        own = network.state_dict()
        network.load_state_dict({key: value for key, value in weights.items() if key in own or not _is_classifier(key)})
    except (KeyError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--align_encoder_weights {file} does not fit --align_encoder {name}: {reason}") from error
    check_finite(weights, file)


def _is_classifier(key: str) -> bool:
    """Whether a weight belongs to a classifier, which the encoder lacks."""
    return key.startswith(("head.", "fc.", "classifier."))


def _patch_of(network: nn.Module) -> int:
    """Pixels per feature: a transformer's patch size, or a convolutional network's total stride."""
    embedding = getattr(network, "patch_embed", None)
    if embedding is not None and hasattr(embedding, "patch_size"):
        return int(embedding.patch_size[0])
    return int(network.feature_info[-1]["reduction"])  # type: ignore[index]
