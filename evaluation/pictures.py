"""Images on a sheet, as PNG."""

from pathlib import Path

import torch
from torchvision.utils import make_grid
from torchvision.transforms.functional import to_pil_image

from runtime.files import atomic_path

__all__ = ["save_grid"]


def save_grid(images: torch.Tensor, path: str | Path, per_row: int = 10, enlarge: int = 1) -> None:
    """Write images uint8 [B, C, H, W] as one PNG, `per_row` a row, each pixel `enlarge` pixels wide."""
    sheet = make_grid(images, nrow=per_row, padding=2, pad_value=255)
    picture = to_pil_image(sheet)
    picture = picture.resize((picture.width * enlarge, picture.height * enlarge), 0)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
