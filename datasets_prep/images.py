"""Image files as uint8 tensors: decoding that names the bad file, and ADM's resize and centre crop."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from options import UsageError

__all__ = ["IMAGE_SUFFIXES", "BadImageError", "center_crop", "crop_array", "decode_image", "open_rgb", "read_image"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


class BadImageError(UsageError):
    """An image that cannot be decoded to its end: `image` names it, `reason` says why."""

    def __init__(self, image: str, reason: object) -> None:
        super().__init__(f"cannot read the image {image}: {reason} (mend or remove it, or pass --skip_bad_images)")
        self.image = image
        self.reason = reason


def read_image(path: str | Path, size: int) -> torch.Tensor:
    """Decode a file into uint8 [3, size, size], resized and centre-cropped by `center_crop`.

    EXIF orientation is applied, transparency is laid on black, 16-bit grey is scaled to 8 bits.

    Raises:
        BadImageError: the file cannot be decoded to its end.
    """
    return _channels_first(center_crop(open_rgb(path, str(path)), size))


def decode_image(data: bytes, size: int, name: str) -> torch.Tensor:
    """As `read_image`, from a file's bytes; `name` is told in an error."""
    return _channels_first(center_crop(open_rgb(io.BytesIO(data), name), size))


def crop_array(values: np.ndarray, size: int) -> torch.Tensor:
    """An image uint8 [H, W, 3] as uint8 [3, size, size], by `center_crop` unless it has that size."""
    fits = values.shape[:2] == (size, size)
    return _channels_first(values.copy() if fits else center_crop(Image.fromarray(values), size))


def open_rgb(source: str | Path | BinaryIO, name: str) -> Image.Image:
    """Decode the whole image of a file into 8-bit RGB, as `read_image` says, in its own size.

    Raises:
        BadImageError: the image cannot be decoded to its end; the message tells `name`.
    """
    try:
        with Image.open(source) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(name, error) from error


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


def _channels_first(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


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
