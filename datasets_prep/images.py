"""Image files as uint8 tensors: decoding that names the bad file, and ADM's resize and centre crop.

Label maps go the way of their images, by nearest neighbour.
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
LONGEST_SIDE = 200  # times the shorter one: the rest would be cropped away, but only after it was enlarged
NO_CLASS = 255  # the id, in label maps, of pixels that belong to none of the classes


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
    return _read(path, str(path), size)


def decode_image(data: bytes, size: int, name: str) -> torch.Tensor:
    """As `read_image`, from a file's bytes; `name` is told in an error."""
    return _read(io.BytesIO(data), name, size)


def _read(source: str | Path | BinaryIO, name: str, size: int) -> torch.Tensor:
    image = open_rgb(source, name)
    with _blamed_on(name):
        return _channels_first(center_crop(image, size))


def crop_array(values: np.ndarray, size: int) -> torch.Tensor:
    """An image uint8 [H, W, 3] as uint8 [3, size, size], by `center_crop` unless it has that size."""
    fits = values.shape[:2] == (size, size)
    return _channels_first(values.copy() if fits else center_crop(Image.fromarray(values), size))


def open_rgb(source: str | Path | BinaryIO, name: str) -> Image.Image:
    """Decode the whole image of a file into 8-bit RGB, as `read_image` says, in its own size.

    Raises:
        BadImageError: the image cannot be decoded to its end; the message tells `name`.
    """
    with _blamed_on(name), Image.open(source) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` and crop the centre, as ADM does (Dhariwal & Nichol 2021).

    The image is halved with a box filter while it is at least twice too large, then resized bicubically.

    Returns:
        uint8 [size, size, 3].
    """
    *halves, last = list(_extents(image.size, size))
    for extent in halves:
        image = image.resize(extent, Image.Resampling.BOX)
    return np.array(_central_square(image.resize(last, Image.Resampling.BICUBIC), size))


def read_map(path: str | Path, image_path: str | Path, size: int, classes: int) -> torch.Tensor:
    """The class ids uint8 [size, size] of an image's pixels, aligned with `read_image(image_path, size)`.

    The file has 8 bits a pixel, grey or with a palette (of which the indices are the ids), in its image's proportions
    before that one's EXIF orientation, which applies to both. Its ids are below `classes`, or NO_CLASS.

    Raises:
        BadImageError: a file cannot be read, or the map is no such file.
    """
    with _blamed_on(str(image_path)), Image.open(image_path) as image:
        extent, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
    with _blamed_on(str(path)), Image.open(path) as file:
        mode, ids = file.mode, np.array(file)
    if mode not in ("L", "P"):
        raise BadImageError(str(path), f"expected a map of 8-bit class ids, but its mode is {mode}")
    foreign = ids[(ids >= classes) & (ids != NO_CLASS)]
    if len(foreign):
        raise BadImageError(str(path), f"expected class ids below {classes} or {NO_CLASS}, but found {foreign[0]}")
    labels = Image.fromarray(ids)
    if labels.width * extent[1] != labels.height * extent[0]:
        found, expected = (f"{width} x {height}" for width, height in (labels.size, extent))
        raise BadImageError(str(path), f"a map of {found} pixels, but its image {image_path} has {expected}")
    labels = labels.resize(extent, Image.Resampling.NEAREST)
    labels.getexif()[ExifTags.Base.Orientation] = orientation
    with _blamed_on(str(path)):
        return torch.from_numpy(crop_map(ImageOps.exif_transpose(labels), size))


def crop_map(labels: Image.Image, size: int) -> np.ndarray:
    """The part [size, size] that `center_crop` leaves, by nearest neighbour."""
    *_, last = _extents(labels.size, size)
    return np.array(_central_square(labels.resize(last, Image.Resampling.NEAREST), size))


@contextmanager
def _blamed_on(name: str) -> Iterator[None]:
    """Whatever a decoder raises becomes a BadImageError of `name`."""
    try:
        yield
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise BadImageError(name, error) from error


def _extents(extent: tuple[int, int], size: int) -> Iterator[tuple[int, int]]:
    """The widths and heights on the way from `extent` to a shorter side of `size`: halves, then the last one."""
    width, height = extent
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        yield width, height
    scale = size / min(width, height)
    last = round(width * scale), round(height * scale)
    if max(last) > LONGEST_SIDE * size:
        raise ValueError(f"{extent[0]} x {extent[1]} is more than {LONGEST_SIDE} times as long as wide")
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
