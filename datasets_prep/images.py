"""Image files as uint8 tensors: decoding, and ADM's resize and center crop.

`open_rgb` is the only reader of image files: training, scoring, statistics, LMDBs and masks all see the same pixels. Errors
name the bad file. Label maps are resized and cropped like their images, but by nearest neighbor.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from datasets_prep.image_bytes import HEAD, describe_content, picture_of_png, read_bytes
from options import UsageError
from runtime.files import UNREADABLE

__all__ = [
    "IMAGE_SUFFIXES",
    "LARGEST_SIZE",
    "MOST_READERS",
    "NO_CLASS",
    "BadImageError",
    "center_crop",
    "crop_array",
    "crop_map",
    "decode_image",
    "image_extent",
    "open_rgb",
    "read_image",
    "read_map",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
LARGEST_SIZE = 65536  # pixels along a side of the square images
MOST_READERS = 1024  # threads
LONGEST_SIDE = 200  # in multiples of the shorter side; longer images could become huge before they are cropped
NO_CLASS = 255  # the id of label-map pixels that belong to no class
BRIGHTEST = 65535  # of the images that are scaled to 8 bits
TURNS = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = 5  # from this orientation on, width and height are exchanged
Result = TypeVar("Result")

# Pillow warns of each broken EXIF tag, which is ignored, and of each large image, which is read (or refused by its error).
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImageError(UsageError):
    """An image that cannot be decoded completely. `image` is its name, `reason` the cause."""

    def __init__(self, image: str, reason: object) -> None:
        if isinstance(reason, OSError) and reason.strerror:
            reason = reason.strerror  # without the file's name, which the message gives
        super().__init__(f"cannot read the image {image}: {reason} (repair or remove it, or pass --skip_bad_images)")
        self.image = image
        self.reason = reason


def read_image(path: str | Path, size: int | None) -> torch.Tensor:
    """Decode a file by `open_rgb` into uint8 [3, size, size], resized and cropped by `center_crop`.

    With `size` None, the image keeps its size: uint8 [3, H, W].

    Raises:
        BadImageError: the file cannot be decoded completely.
    """
    return _read(path, str(path), size)


def decode_image(data: bytes, size: int | None, name: str) -> torch.Tensor:
    """Like `read_image`, but from a file's bytes. Errors contain `name`."""
    return _read(io.BytesIO(data), name, size)


def _read(source: str | Path | BinaryIO, name: str, size: int | None) -> torch.Tensor:
    image = open_rgb(source, name)
    with _as_bad_image(name):
        return _channels_first(np.array(image) if size is None else center_crop(image, size))


def crop_array(values: np.ndarray, size: int | None) -> torch.Tensor:
    """Convert an image uint8 [H, W, 3] to uint8 [3, size, size], with `center_crop` if its size differs.

    With `size` None, the image keeps its size: uint8 [3, H, W].
    """
    if size is None or values.shape[:2] == (size, size):
        return _channels_first(values.copy())
    return _channels_first(center_crop(Image.fromarray(values), size))


def open_rgb(source: str | Path | BinaryIO, name: str) -> Image.Image:
    """Decode an image file into 8-bit RGB at its original size.

    EXIF orientation is applied if it is readable. All other metadata is ignored, broken or not. Transparent images are
    composited onto black. 16-bit grayscale is scaled to 8 bits. Floating-point images have the range 0 to 1, 0 to 255 or 0 to
    65535, the smallest that holds their largest value. Of an animation, the first frame is read.

    Raises:
        BadImageError: the image cannot be decoded completely; the message contains `name`.
    """

    def decode(image: Image.Image) -> Image.Image:
        image.load()
        return _turned(_to_rgb(image), _orientation(image))

    return _opened(source, name, decode)


def image_extent(source: str | Path | BinaryIO, name: str) -> tuple[int, int]:
    """The height and width of the image that `open_rgb` returns, usually without decoding it.

    Raises:
        BadImageError: the file is not an image; the message contains `name`.
    """
    width, height = _opened(source, name, _upright_size)
    return height, width


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
    orientation, extent = _opened(
        image_path, str(image_path), lambda image: (_orientation(image), _upright_size(image))
    )
    extent = extent[::-1] if orientation >= SIDEWAYS else extent
    mode, ids = _opened(path, str(path), lambda file: (file.mode, np.array(file)))
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
    with _as_bad_image(str(path)):
        return torch.from_numpy(crop_map(_turned(labels, orientation), size))


def crop_map(labels: Image.Image, size: int) -> np.ndarray:
    """Resize and crop a label map to [size, size] like `center_crop`, but by nearest neighbor."""
    *_, last = _extents(labels.size, size)
    return np.array(_central_square(labels.resize(last, Image.Resampling.NEAREST), size))


def _opened(source: str | Path | BinaryIO, name: str, read: Callable[[Image.Image], Result]) -> Result:
    """The result of `read` for an image file; of a PNG that Pillow refuses, the metadata is left out.

    Raises:
        BadImageError: the file cannot be read; the message contains `name`.
    """
    with _as_bad_image(name):
        try:
            with Image.open(source) as image:
                return read(image)
        except UNREADABLE as error:
            picture = picture_of_png(read_bytes(source))
            if picture is not None:
                with suppress(*UNREADABLE), Image.open(io.BytesIO(picture)) as image:
                    return read(image)
            if not isinstance(error, UnidentifiedImageError):  # whose message holds the address of an object
                raise
            raise BadImageError(name, describe_content(read_bytes(source, HEAD))) from error


@contextmanager
def _as_bad_image(name: str) -> Iterator[None]:
    """Convert decoding errors to a BadImageError for `name`."""
    try:
        yield
    except BadImageError:
        raise
    except (*UNREADABLE, AssertionError, Image.DecompressionBombError) as error:
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


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, a key of TURNS; 1 if it is upright, missing or unreadable."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*UNREADABLE, AssertionError):  # a broken EXIF block says nothing about the pixels
        return 1
    return found if found in TURNS else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """The width and height of the turned image; loads the image if it lies on its side."""
    if image.width != image.height and _orientation(image) >= SIDEWAYS:
        image.load()  # TIFF images are upright before or after this, depending on Pillow's version
        if _orientation(image) >= SIDEWAYS:
            return image.height, image.width
    return image.size


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image of 16-bit, 32-bit or floating-point gray values to 8 bits."""
    values = np.asarray(image, dtype=np.float64)
    brightest = values.max()
    if not brightest <= BRIGHTEST or not np.isfinite(values.min()):
        raise ValueError(f"expected finite gray values up to {BRIGHTEST}, but found {values.min():g} to {brightest:g}")
    if "transparency" in image.info:  # a gray value
        values = np.where(values == image.info["transparency"], 0, values)
    sixteen_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    if sixteen_bits or brightest > 255:
        values = values / 257
    elif image.mode == "F" and brightest <= 1:
        values = values * 255
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
