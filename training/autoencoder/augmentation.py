"""Random changes of training images. They need no condition, because an autoencoder does not sample."""

from collections.abc import Callable

import torch
from torch.nn import functional

from runtime.randomness import StepDraws

__all__ = ["AUGMENTATIONS", "augment"]

LARGEST_SHIFT = 8  # the side divided by this is the largest shift
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.2, 0.3  # largest changes


def _mirror(pixels: torch.Tensor, draws: StepDraws) -> torch.Tensor:
    """Mirror each image with probability 1/2."""
    mirrored = draws.uniform("flip") < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(3), pixels)


def _shift(pixels: torch.Tensor, draws: StepDraws) -> torch.Tensor:
    """Shift each image by up to an eighth of its side in both directions, without interpolation; borders are reflected."""
    height, width = pixels.shape[2:]
    margin = min(height, width) // LARGEST_SHIFT
    padded = functional.pad(pixels, (margin,) * 4, mode="reflect")
    rows, columns = (draws.uniform("crop", (2,)) * (2 * margin + 1)).long().unbind(1)
    y = rows.view(-1, 1, 1) + torch.arange(height, device=pixels.device).view(1, -1, 1)
    x = columns.view(-1, 1, 1) + torch.arange(width, device=pixels.device).view(1, 1, -1)
    images = torch.arange(len(pixels), device=pixels.device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[images, y, x].permute(0, 3, 1, 2)


def _recolor(pixels: torch.Tensor, draws: StepDraws) -> torch.Tensor:
    """Change brightness, contrast and saturation of each image; the result stays in [-1, 1]."""
    changes = (2 * draws.uniform("color", (3,)) - 1).view(-1, 3, 1, 1, 1).unbind(1)
    brightness, contrast, saturation = (
        change * largest for change, largest in zip(changes, (BRIGHTNESS, CONTRAST, SATURATION), strict=True)
    )
    gray = pixels.mean(1, keepdim=True)
    colored = gray + (pixels - gray) * (1 + saturation)
    center = colored.mean((1, 2, 3), keepdim=True)
    return (center + (colored - center) * (1 + contrast) + brightness).clamp(-1, 1)


AUGMENTATIONS: dict[str, Callable[[torch.Tensor, StepDraws], torch.Tensor]] = {
    "flip": _mirror,
    "crop": _shift,
    "color": _recolor,
}


def augment(pixels: torch.Tensor, names: tuple[str, ...], draws: StepDraws) -> torch.Tensor:
    """Apply the named augmentations, in the order of AUGMENTATIONS, to pixels [B, C, H, W] in [-1, 1]."""
    for name, change in AUGMENTATIONS.items():
        if name in names:
            pixels = change(pixels, draws)
    return pixels
