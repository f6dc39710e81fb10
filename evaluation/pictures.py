"""Sheets of samples as PNG: one class a column, eight rows."""

from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from runtime.files import atomic_path

__all__ = ["grid_count", "save_grid"]

ROWS = 8
MOST_COLUMNS = 10
SMALLEST_TILE = 56  # pixels; smaller images are enlarged


def grid_count(num_classes: int) -> int:
    """Number of samples on a sheet."""
    return ROWS * _columns(num_classes)


def save_grid(images: torch.Tensor, path: str | Path, num_classes: int) -> None:
    """Write the first images uint8 [B, C, H, W] as one PNG; samples whose labels come in turn get a column per class."""
    sheet = make_grid(images[: grid_count(num_classes)], nrow=_columns(num_classes), padding=2, pad_value=255)
    picture, scale = to_pil_image(sheet), -(-SMALLEST_TILE // images.shape[-1])
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def _columns(num_classes: int) -> int:
    return min(MOST_COLUMNS, num_classes) if num_classes > 1 else ROWS
