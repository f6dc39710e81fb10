"""Image files as uint8 tensors: decoding, and ADM's resize and center crop.

Errors name the bad file. Label maps are resized and cropped like their images, but by nearest neighbor.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from options import UsageError
from runtime.files import UNREADABLE

__all__ = [
    "IMAGE_SUFFIXES",
    "NO_CLASS",
    "BadImageError",
    "center_crop",
    "crop_array",
    "crop_map",
    "decode_image",
    "open_rgb",
    "read_image",
    "read_map",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
LONGEST_SIDE = 200  # in multiples of the shorter side; longer images could become huge before they are cropped
NO_CLASS = 255  # the id of label-map pixels that belong to no class


class BadImageError(UsageError):
    """An image that cannot be decoded completely. `image` is its name, `reason` the cause."""

    def __init__(self, image: str, reason: object) -> None:
        super().__init__(f"cannot read the image {image}: {reason} (repair or remove it, or pass --skip_bad_images)")
        self.image = image
        self.reason = reason


def read_image(path: str | Path, size: int) -> torch.Tensor:
    """Decode a file into uint8 [3, size, size], resized and cropped by `center_crop`.

    EXIF orientation is applied, transparent images are composited onto black, and 16-bit grayscale is scaled to 8 bits.

    Raises:
        BadImageError: the file cannot be decoded completely.
    """
    return _read(path, str(path), size)


def decode_image(data: bytes, size: int, name: str) -> torch.Tensor:
    """Like `read_image`, but from a file's bytes. Errors contain `name`."""
    return _read(io.BytesIO(data), name, size)


def _read(source: str | Path | BinaryIO, name: str, size: int) -> torch.Tensor:
    image = open_rgb(source, name)
    with _as_bad_image(name):
        return _channels_first(center_crop(image, size))


def crop_array(values: np.ndarray, size: int) -> torch.Tensor:
    """Convert an image uint8 [H, W, 3] to uint8 [3, size, size], with `center_crop` if its size differs."""
    fits = values.shape[:2] == (size, size)
    return _channels_first(values.copy() if fits else center_crop(Image.fromarray(values), size))


def open_rgb(source: str | Path | BinaryIO, name: str) -> Image.Image:
    """Decode an image file into 8-bit RGB at its original size. See `read_image` for the conversions.

    Raises:
        BadImageError: the image cannot be decoded completely; the message contains `name`.
    """
    with _as_bad_image(name), Image.open(source) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` and crop the center, as in ADM (Dhariwal & Nichol 2021).

    A box filter halves the image while its shorter side is at least 2 * size. Then it is resized bicubically.

    Returns:
        uint8 [size, size, 3].
    """
    *halves, last = list(_extents(image.size, size))
    for extent in halves:
        image = image.resize(extent, Image.Resampling.BOX)
    return np.array(_central_square(image.resize(last, Image.Resampling.BICUBIC), size))


def read_map(path: str | Path, image_path: str | Path, size: int, classes: int) -> torch.Tensor:
    """Read a label map as class ids uint8 [size, size], aligned with `read_image(image_path, size)`.

    The file has 8 bits per pixel, either gray values or palette indices, which are the ids. Ids are below `classes`, or
    NO_CLASS. The map has the aspect ratio of the stored image; the image's EXIF orientation is applied to both.

    Raises:
        BadImageError: a file cannot be read, or the map has an unexpected mode, id or aspect ratio.
    """
    with _as_bad_image(str(image_path)), Image.open(image_path) as image:
        extent, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
    with _as_bad_image(str(path)), Image.open(path) as file:
        mode, ids = file.mode, np.array(file)
    if mode not in ("L", "P"):
        raise BadImageError(str(path), f"expected a map of 8-bit class ids, but its mode is {mode}")
    foreign = ids[(ids >= classes) & (ids != NO_CLASS)]
    if len(foreign):
        raise BadImageError(str(path), f"expected class ids below {classes} or {NO_CLASS}, but found {foreign[0]}")
    labels = Image.fromarray(ids)
    if labels.width * extent[1] != labels.height * extent[0]:
        found, expected = (f"{width} x {height}" for width, height in (labels.size, extent))
        raise BadImageError(
            str(path), f"expected the aspect ratio of {image_path}, {expected}, but the map has {found}"
        )
    labels = labels.resize(extent, Image.Resampling.NEAREST)
    labels.getexif()[ExifTags.Base.Orientation] = orientation
    with _as_bad_image(str(path)):
        return torch.from_numpy(crop_map(ImageOps.exif_transpose(labels), size))


def crop_map(labels: Image.Image, size: int) -> np.ndarray:
    """Resize and crop a label map to [size, size] like `center_crop`, but by nearest neighbor."""
    *_, last = _extents(labels.size, size)
    return np.array(_central_square(labels.resize(last, Image.Resampling.NEAREST), size))


@contextmanager
def _as_bad_image(name: str) -> Iterator[None]:
    """Convert decoding errors to a BadImageError for `name`."""
    try:
        yield
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise BadImageError(name, error) from error


def _extents(extent: tuple[int, int], size: int) -> Iterator[tuple[int, int]]:
    """Yield the (width, height) after each halving of `extent`, then the last one, whose shorter side is `size`."""
    width, height = extent
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        yield width, height
    scale = size / min(width, height)
    last = round(width * scale), round(height * scale)
    if max(last) > LONGEST_SIDE * size:
        raise ValueError(f"the aspect ratio of {extent[0]} x {extent[1]} pixels is above {LONGEST_SIDE}")
    yield last


def _central_square(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


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
