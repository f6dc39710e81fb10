"""Sheets of samples as PNG (one class a column, eight rows), and moving ones as GIF."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from runtime.files import atomic_path

__all__ = ["grid_count", "save_animation", "save_grid", "save_sheet"]

ROWS = 8
MOST_COLUMNS = 10
FRAME_MS, LAST_FRAME_MS = 120, 1500
SMALLEST_TILE = 56  # pixels; smaller images are enlarged


def grid_count(num_classes: int) -> int:
    """Number of samples on a sheet."""
    return ROWS * _columns(num_classes)


def save_grid(images: torch.Tensor, path: str | Path, num_classes: int) -> None:
    """Write the first images uint8 [B, C, H, W] as one PNG; samples whose labels come in turn get a column per class."""
    save_sheet(images[: grid_count(num_classes)], path, _columns(num_classes))


def save_sheet(images: torch.Tensor, path: str | Path, columns: int) -> None:
    """Write images uint8 [N, C, H, W] as one PNG, row by row."""
    with atomic_path(path) as temporary:
        _sheet(images, columns).save(temporary, format="PNG")


def save_animation(frames: Sequence[torch.Tensor], path: str | Path, columns: int) -> None:
    """Write frames of images uint8 [N, C, H, W] as a GIF that runs for ever and rests on its last frame."""
    first, *others = (_sheet(images, columns).convert("RGB") for images in frames)
    durations = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    with atomic_path(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def _sheet(images: torch.Tensor, columns: int) -> Image.Image:
    picture = to_pil_image(make_grid(images, nrow=columns, padding=2, pad_value=255))
    scale = -(-SMALLEST_TILE // images.shape[-1])
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _columns(num_classes: int) -> int:
    return min(MOST_COLUMNS, num_classes) if num_classes > 1 else ROWS
