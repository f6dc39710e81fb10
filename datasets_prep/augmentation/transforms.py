"""Changes of training images, each with the parameters that the network gets (models.conditions.AUGMENTATIONS).

    flip    mirrored            1 in a mirror image
    crop    zoom                z: the image is a window of side 1 - z / 4, enlarged to the whole side
            shift_x, shift_y    the window's center, from the left and top: (1 + shift / 4) / 2, where |shift| <= z
    color   brightness          b: pixels + 0.2 b, where 1 is white
            contrast            c: differences from mid-gray, times 2^(c / 2)
            saturation          s: differences from the mean over channels, times 2^s

Zeros are the image itself. The window lies inside the image, so nothing beyond its border is invented. Parameters do not depend
on a run's seed, so that changed images can be encoded once and cached. Non-leaking augmentation: Karras et al. 2022
(arXiv:2206.00364, section 5 and appendix F.2).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from models.conditions import AUGMENTATIONS
from runtime.randomness import generator_for

__all__ = ["TRANSFORMS", "Transform", "augment", "draw_parameters"]

CROPPED = 0.25  # share of the side that the strongest zoom crops
WHITE, MID_GRAY = 255.0, 127.5
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.5, 1.0  # share of white, and powers of two


class Transform(NamedTuple):
    """A kind of augmentation.

    Args:
        draw: takes uniform numbers [R, n] in [0, 1) and the numbers of the copies [R], returns parameters [R, n].
        apply: takes pixels [C, H, W] in [0, 255] and the n parameters, returns the changed pixels.
    """

    draw: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _draw_flip(uniform: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
    """Every other copy is mirrored, starting with the first."""
    return (copies % 2 == 0)[:, None].to(uniform)


def _flip(pixels: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    return pixels.flip(2) if parameters[0] else pixels


def _draw_crop(uniform: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
    zoom = uniform[:, :1]
    return torch.cat([zoom, zoom * (2 * uniform[:, 1:] - 1)], dim=1)


def _crop(pixels: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    zoom, shift_x, shift_y = (CROPPED * parameters).tolist()
    window = torch.tensor([[[1 - zoom, 0, shift_x], [0, 1 - zoom, shift_y]]])
    grid = functional.affine_grid(window, [1, *pixels.shape], align_corners=False)
    return functional.grid_sample(pixels[None], grid, padding_mode="border", align_corners=False)[0]


def _draw_color(uniform: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
    return 2 * uniform - 1


def _color(pixels: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    brightness, contrast, saturation = parameters.tolist()
    gray = pixels.mean(0, keepdim=True)
    pixels = gray + 2 ** (SATURATION * saturation) * (pixels - gray)
    pixels = MID_GRAY + 2 ** (CONTRAST * contrast) * (pixels - MID_GRAY)
    return pixels + WHITE * BRIGHTNESS * brightness


# The kinds of AUGMENTATIONS, in the same order, in which they are applied.
TRANSFORMS: Mapping[str, Transform] = {
    "flip": Transform(_draw_flip, _flip),
    "crop": Transform(_draw_crop, _crop),
    "color": Transform(_draw_color, _color),
}


def draw_parameters(kinds: Sequence[str], images: int, copies: int) -> torch.Tensor:
    """The parameters [images x copies, P] of copies of images. A kind's parameters do not depend on the others."""
    numbers = torch.arange(copies).repeat(images)
    drawn = list[torch.Tensor]()
    for kind in kinds:
        generator = generator_for("augment", kind, images, copies)
        uniform = torch.rand(len(numbers), len(AUGMENTATIONS[kind]), generator=generator)
        drawn.append(TRANSFORMS[kind].draw(uniform, numbers))
    return torch.cat(drawn, dim=1)


def augment(image: torch.Tensor, kinds: Sequence[str], parameters: torch.Tensor) -> torch.Tensor:
    """Change an image uint8 [C, H, W] as its parameters [P] say."""
    pixels = image.float()
    own = parameters.split([len(AUGMENTATIONS[kind]) for kind in kinds])
    for kind, values in zip(kinds, own, strict=True):
        pixels = TRANSFORMS[kind].apply(pixels, values)
    return pixels.round().clamp(0, WHITE).to(torch.uint8)
