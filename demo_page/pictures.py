"""Convert between the page's pictures and the network's images, masks and label maps."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from datasets_prep.conditions import class_shares
from datasets_prep.image_dataset import DatasetFacts, shown_side
from datasets_prep.images import center_crop, crop_map
from datasets_prep.label_maps.segmented_dataset import NO_CLASS, MapClasses, colour_map
from options import UsageError
from runtime.pictures import draw_sheet

__all__ = ["canvas_side", "enlarged", "pad_like", "painted_hole", "painted_image", "painted_map", "sheet", "start_map"]

CANVAS = 448  # pixels; the least side of a picture to paint on
TILE = 112  # pixels; the least side of a sample in a sheet
COLUMNS = 5
OPAQUE = 128  # the least alpha of a painted pixel
LEAST_COVER = 64  # of 255: the painted share of a pixel from which on it belongs to the hole


def sheet(images: torch.Tensor) -> Image.Image:
    """Lay out images, uint8 [N, C, H, W], in rows of about the same length."""
    rows = math.ceil(len(images) / COLUMNS)
    return draw_sheet(images, math.ceil(len(images) / rows), TILE)


def canvas_side(side: int) -> int:
    """Side of the canvas for images of `side` pixels: the least multiple from CANVAS on."""
    return side * max(1, math.ceil(CANVAS / side))


def enlarged(image: torch.Tensor) -> np.ndarray:
    """Enlarge an image, uint8 [C, H, W], to the canvas: uint8 [S, S, 3]."""
    factor = canvas_side(image.shape[-1]) // image.shape[-1]
    large = image.expand(3, -1, -1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return large.permute(1, 2, 0).contiguous().numpy()


def painted_image(painting: Mapping[str, Any] | None, facts: DatasetFacts) -> torch.Tensor:
    """The picture below the strokes, as an image like the dataset's, uint8 [C, H, W] without padding.

    The central square is resized, transparent pixels become black, and the image becomes gray if the dataset is.

    Args:
        painting: the editor's value: `background` and `layers`, uint8 [H, W, 4].
        facts: facts about the dataset.

    Raises:
        UsageError: no picture was given.
    """
    pixels = None if painting is None else painting.get("background")
    if pixels is None or not pixels.size or not pixels[..., 3].any():
        raise UsageError("there is no image yet: upload one, or draw one with the button Draw an image")
    opaque = Image.fromarray(np.where(pixels[..., 3:] < OPAQUE, np.uint8(0), pixels[..., :3]))
    resized = _to_side(opaque.convert("L" if facts.channels == 1 else "RGB"), shown_side(facts))
    return torch.from_numpy(resized).view(*resized.shape[:2], -1).permute(2, 0, 1).contiguous()


def painted_hole(painting: Mapping[str, Any], side: int) -> torch.Tensor:
    """The strokes as a hole, bool [side, side].

    Raises:
        UsageError: nothing or everything is painted.
    """
    cover = np.max([layer[..., 3] for layer in painting["layers"]], axis=0) if painting["layers"] else np.zeros((1, 1))
    hole = torch.from_numpy(_to_side(Image.fromarray(cover.astype(np.uint8)), side)) >= LEAST_COVER
    if hole.all() or not hole.any():
        found = "all of it" if hole.any() else "nothing"
        raise UsageError(f"brush over the part of the image to fill: {found} is brushed now")
    return hole


def painted_map(painting: Mapping[str, Any] | None, classes: MapClasses, side: int) -> torch.Tensor:
    """The label map, uint8 [side, side], whose classes have the nearest colors. A pixel takes its most frequent class.

    Transparent pixels are background, or of no class if the classes have no background.

    Raises:
        UsageError: the painting is empty.
    """
    pixels = None if painting is None else painting.get("composite")
    if pixels is None or not pixels.size or not pixels[..., 3].any():
        raise UsageError("the label map is empty: paint on it with the classes' colors")
    ids = _nearest_classes(pixels, classes)
    factor = canvas_side(side) // side
    whole = torch.from_numpy(crop_map(Image.fromarray(ids), side * factor))
    shares = class_shares(whole[None], classes.count, factor)[0]
    most, found = shares.max(0)
    return torch.where(most > 1 - shares.sum(0), found, NO_CLASS).to(torch.uint8)


def start_map(classes: MapClasses, side: int) -> np.ndarray:
    """A canvas uint8 [S, S, 3] to start from: a block of class 1 (or of the last class) on class 0."""
    maps = torch.zeros(1, side, side, dtype=torch.uint8)
    maps[:, side // 8 : -side // 8, side // 4 : -side // 4] = min(1, classes.count - 1)
    return enlarged(colour_map(maps, classes)[0])


def pad_like(images: torch.Tensor, facts: DatasetFacts) -> torch.Tensor:
    """Add the dataset's padding, zeros, to images or maps [..., H, W]."""
    border = 0 if facts.crop is None else (facts.image_size - facts.crop) // 2
    return functional.pad(images, [border] * 4)


def _to_side(image: Image.Image, side: int) -> np.ndarray:
    """Crop and resize to [side, side, ...]. An enlarged sample is reduced to exactly the sample."""
    if image.width == image.height and image.width % side == 0:
        return np.array(image.resize((side, side), Image.Resampling.BOX))
    return center_crop(image, side)


def _nearest_classes(pixels: np.ndarray, classes: MapClasses) -> np.ndarray:
    """The class ids uint8 [H, W] of the nearest colors to pixels uint8 [H, W, 4]."""
    colors, inverse = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    distances = np.square(colors[:, None, :3].astype(int) - classes.palette[None].astype(int)).sum(2)
    ids = np.where(colors[:, 3] < OPAQUE, 0 if classes.background else NO_CLASS, distances.argmin(1))
    return ids.astype(np.uint8)[inverse].reshape(pixels.shape[:2])
