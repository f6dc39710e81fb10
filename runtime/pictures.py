"""Save sample grids as PNG files and read them back, and save animated grids as GIF files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from options import UsageError, option
from runtime.files import UNREADABLE, atomic_path

__all__ = ["GridOptions", "Sheet", "draw_sheet", "read_sheet", "save_animation", "save_sheet", "side_by_side"]

ROWS = 8
MOST_COLUMNS = 10
FRAME_MS, LAST_FRAME_MS = 120, 1500
SMALLEST_TILE = 56  # pixels; smaller images are enlarged
PADDING, WHITE = 2, 255  # around the images of a grid


class Sheet(NamedTuple):
    """Images, uint8 [N, C, H, W], to lay out in rows of `columns` images."""

    images: torch.Tensor
    columns: int


def side_by_side(groups: Sequence[torch.Tensor]) -> Sheet:
    """Put the i-th images of all groups, uint8 [N, C, H, W] each, side by side; grayscale groups are expanded to color."""
    channels = max(group.shape[1] for group in groups)
    alike = [group.cpu().expand(-1, channels, -1, -1) for group in groups]
    images = torch.stack(alike, dim=1).flatten(0, 1)
    return Sheet(images, len(groups) * max(1, MOST_COLUMNS // len(groups)))


@dataclass(frozen=True)
class GridOptions:
    """Sample grids."""

    on_resume: ClassVar = "freely"

    grid_samples: int | None = option(None, "samples per grid; default: eight rows", minimum=1)
    grid_columns: int | None = option(
        None,
        "samples per row of a grid; default: one column per class (at most ten), or eight without classes",
        minimum=1,
    )

    show_neighbours: bool = option(
        False,
        "also draw each sample of the newest grid to the left of its nearest training image, in samples/neighbours.png",
    )

    def columns(self, num_classes: int) -> int:
        """Samples per row; by default one column per class, since the labels of samples cycle through the classes."""
        return self.grid_columns or (min(MOST_COLUMNS, num_classes) if num_classes > 1 else ROWS)

    def count(self, num_classes: int) -> int:
        """Samples per grid."""
        return self.grid_samples or ROWS * self.columns(num_classes)


def save_sheet(images: torch.Tensor, path: str | Path, columns: int) -> None:
    """Save images, uint8 [N, C, H, W], as one PNG, row by row."""
    with atomic_path(path) as temporary:
        draw_sheet(images, columns).save(temporary, format="PNG")


def read_sheet(path: str | Path, side: int, channels: int) -> torch.Tensor:
    """Read the images uint8 [N, channels, side, side] of a grid that `save_sheet` wrote. White ones at its end are left out.

    Raises:
        UsageError: the file is unreadable, or not a grid of images of this size.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except UNREADABLE as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    scale, cell = _scale(side), side + PADDING
    small = torch.from_numpy(pixels[::scale, ::scale]).permute(2, 0, 1)[:channels]
    if small.shape[1:] == (side, side):  # a single image has no padding
        return small[None]
    if any(length % cell != PADDING for length in small.shape[1:]) or len(pixels) != small.shape[1] * scale:
        raise UsageError(f"{path}: expected a grid of {side} x {side} images, as training and sampling save them")
    tiles = small[:, PADDING:, PADDING:].unfold(1, side, cell).unfold(2, side, cell)  # [C, rows, columns, side, side]
    images = tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)
    filled = (images != WHITE).flatten(1).any(1).nonzero()
    return images[: int(filled.max()) + 1 if len(filled) else 0]


def save_animation(frames: Sequence[torch.Tensor], path: str | Path, columns: int) -> None:
    """Save frames of images, uint8 [N, C, H, W] each, as a GIF that loops forever and pauses on its last frame."""
    first, *others = (draw_sheet(images, columns).convert("RGB") for images in frames)
    durations = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    with atomic_path(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def draw_sheet(images: torch.Tensor, columns: int, tile: int = SMALLEST_TILE) -> Image.Image:
    """Lay out images, uint8 [N, C, H, W], row by row. Images smaller than `tile` pixels are enlarged."""
    picture = to_pil_image(make_grid(images, nrow=columns, padding=PADDING, pad_value=WHITE))
    scale = _scale(images.shape[-1], tile)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _scale(side: int, tile: int = SMALLEST_TILE) -> int:
    """The factor by which images of this side are enlarged to at least `tile` pixels."""
    return -(-tile // side)
