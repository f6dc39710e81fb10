"""Image files as uint8 tensors: decoding that names the bad file, and ADM's resize and centre crop."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from options import UsageError

__all__ = ["IMAGE_SUFFIXES", "center_crop", "read_image"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


def read_image(path: str | Path, size: int) -> torch.Tensor:
    """Decode a file into uint8 [3, size, size], resized and centre-cropped by `center_crop`.

    EXIF orientation is applied, transparency is laid on black, 16-bit grey is scaled to 8 bits.

    Raises:
        UsageError: the file cannot be decoded to its end; the message names it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return torch.from_numpy(center_crop(_to_rgb(upright), size)).permute(2, 0, 1).contiguous()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"cannot read the image {path}: {error} (mend or remove it, or pass --skip_bad_images)"
        ) from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` and crop the centre, as ADM does (Dhariwal & Nichol 2021).

    The image is halved with a box filter while it is at least twice too large, then resized bicubically.

    Returns:
        uint8 [size, size, 3].
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        scale = 257.0 if image.mode.startswith("I;16") or values.max() > 255 else 1.0
        image = Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")
