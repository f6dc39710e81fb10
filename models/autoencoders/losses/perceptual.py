"""LPIPS, the perceptual distance of images (Zhang et al. 2018, arXiv:1801.03924): weighted differences of a network's features.

The package lpips holds the features' weights. The network, VGG-16 or AlexNet, has torchvision's weights for ImageNet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from options import UsageError, option

__all__ = ["BACKBONES", "Backbone", "PerceptualOptions", "build_lpips", "perceptual_distance"]


class Backbone(NamedTuple):
    """A network whose features LPIPS compares: its title, torchvision's weights, and the smallest images' side in pixels."""

    title: str
    url: str
    smallest: int


# Below 31 pixels, nothing is left after AlexNet's second pooling.
BACKBONES = {
    "vgg": Backbone("VGG-16", "https://download.pytorch.org/models/vgg16-397923af.pth", 16),
    "alex": Backbone("AlexNet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", 31),
}


@dataclass(frozen=True)
class PerceptualOptions:
    """Perceptual loss."""

    lpips_weight: float = option(0.0, "weight of LPIPS (usually 1, with --l1_weight 1); 0: none", minimum=0)
    lpips_network: str = option("vgg", "network of LPIPS: vgg (VGG-16) or alex (AlexNet, faster)", choices=BACKBONES)
    lpips_backbone: str = option(
        "",
        "file of torchvision's weights of that network; default: torch's cache, to which they are downloaded",
        on_resume="on_request",
    )


def build_lpips(network: str, flag: str, read_weights: Callable[[], Mapping[str, torch.Tensor]]) -> nn.Module:
    """Build LPIPS, frozen, which maps two batches of pixels [B, 3, H, W] in [-1, 1] to distances [B, 1, 1, 1].

    Args:
        network: a key of BACKBONES.
        flag: the option that asks for LPIPS, for error messages.
        read_weights: reads torchvision's state dict of that network, which may download it.

    Raises:
        UsageError: the package lpips is not installed, or the weights do not fit.
    """
    try:
        import lpips
    except ImportError as error:
        raise UsageError(f"{flag} needs the package lpips: pip install lpips") from error
    weights = read_weights()
    built = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    layers = {name.partition(".")[2]: parameter for name, parameter in built.net.named_parameters()}
    try:
        for name, parameter in layers.items():  # lpips renames torchvision's "features.0.weight" to "slice1.0.weight"
            parameter.data.copy_(weights[f"features.{name}"])
    except (KeyError, RuntimeError) as error:
        title = BACKBONES[network].title
        raise UsageError(
            f"{flag}: expected torchvision's state dict of {title}, but the file differs ({error})"
        ) from error
    return built.eval().requires_grad_(False)


def perceptual_distance(lpips_network: nn.Module, decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Mean LPIPS, 0-d float32 even under autocast, of images [B, 1 or 3, H, W] in [-1, 1]; gray images are repeated."""
    with torch.autocast(decoded.device.type, enabled=False):
        ours, theirs = (each.float().expand(-1, 3, -1, -1) for each in (decoded, pixels))
        return lpips_network(ours, theirs).mean()
