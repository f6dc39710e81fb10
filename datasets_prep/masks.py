"""Draw inpainting masks at random, or read them from a folder. True marks the hole, which is to be filled.

    python -m datasets_prep.masks OUT.png --size 64

The command draws one row of masks per kind and prints their hole ratios.

`strokes` follows DeepFillv2 (Yu et al. 2019, Algorithm 1): polylines with random angles, lengths and widths. `mixed` combines
strokes and random boxes, like the wide masks of LaMa (Suvorov et al. 2022) and CoModGAN (Zhao et al. 2021). `half` and
`lines` (every other row) follow RePaint (Lugmayr et al. 2022). `outpaint` follows Palette (Saharia et al. 2022).

All lengths are relative to the image's side, so a mask looks the same at every size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

from command_line import leading_word, parse_options
from datasets_prep.folders import list_files
from datasets_prep.images import IMAGE_SUFFIXES, BadImageError, crop_map, open_rgb
from exits import exit_cleanly
from options import UsageError, option
from runtime.files import atomic_path
from runtime.messages import show
from runtime.randomness import generator_for

__all__ = ["MASK_KINDS", "MaskOptions", "MaskSetOptions", "draw_mask", "hole_ratio", "main", "mask_set"]

Draw = Callable[[int, torch.Generator], np.ndarray]

# Ranges of the random numbers. Lengths are relative to the image's side.
STROKES, VERTICES = (1, 4), (4, 12)
STROKE_LENGTH, STROKE_WIDTH = (0.05, 0.35), (0.05, 0.15)
BOXES, BOX_SIDE = (1, 4), (0.1, 0.5)
SIDE_DEPTH, RING_DEPTH = (0.25, 0.5), (0.125, 0.25)  # depths of outpainting masks on one side, and on all sides
BOTH_SHARE = 0.2  # share of mixed masks with both strokes and boxes
HOLE_RATIOS = (0.02, 0.8)  # random masks outside this range are drawn again
WHITE = 128  # the darkest gray that marks a hole in a mask file
SHEET_COLUMNS = 8


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _redrawn(draw: Draw, size: int, generator: torch.Generator) -> np.ndarray:
    """Draw until the hole's share of the image is within HOLE_RATIOS."""
    while True:
        mask = draw(size, generator)
        if HOLE_RATIOS[0] <= mask.mean() <= HOLE_RATIOS[1]:
            return mask


def _strokes(size: int, generator: torch.Generator) -> np.ndarray:
    image = Image.new("1", (size, size))
    pen = ImageDraw.Draw(image)
    for _ in range(_integer(generator, *STROKES)):
        width = max(1, round(size * _uniform(generator, *STROKE_WIDTH)))
        x, y = _uniform(generator, 0, 1), _uniform(generator, 0, 1)
        points = [(size * x, size * y)]
        for _ in range(_integer(generator, *VERTICES) - 1):
            angle, length = _uniform(generator, 0, 2 * math.pi), _uniform(generator, *STROKE_LENGTH)
            x = min(max(x + length * math.cos(angle), 0.0), 1.0)
            y = min(max(y + length * math.sin(angle), 0.0), 1.0)
            points.append((size * x, size * y))
        pen.line(points, fill=1, width=width)
        for across, down in points:
            pen.ellipse((across - width / 2, down - width / 2, across + width / 2, down + width / 2), fill=1)
    return np.array(image)


def _boxes(size: int, generator: torch.Generator) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    for _ in range(_integer(generator, *BOXES)):
        width, height = _uniform(generator, *BOX_SIDE), _uniform(generator, *BOX_SIDE)
        left, top = _uniform(generator, 0, 1 - width), _uniform(generator, 0, 1 - height)
        rows, columns = (
            slice(round(size * start), round(size * (start + side))) for start, side in ((top, height), (left, width))
        )
        mask[rows, columns] = True
    return mask


def _mixed(size: int, generator: torch.Generator) -> np.ndarray:
    """Both strokes and boxes with probability BOTH_SHARE; otherwise either, with equal probability."""
    chance = _uniform(generator, 0, 1)
    if chance < BOTH_SHARE:
        return _strokes(size, generator) | _boxes(size, generator)
    return (_strokes if chance < (1 + BOTH_SHARE) / 2 else _boxes)(size, generator)


def _outpaint(size: int, generator: torch.Generator) -> np.ndarray:
    """One of the four sides or all sides, with equal probability."""
    mask = np.zeros((size, size), bool)
    side = _integer(generator, 0, 4)
    depth = max(1, round(size * _uniform(generator, *(SIDE_DEPTH if side < 4 else RING_DEPTH))))
    if side < 4:
        mask[:depth] = True
        return np.rot90(mask, side).copy()
    mask[:depth] = mask[-depth:] = mask[:, :depth] = mask[:, -depth:] = True
    return mask


def _centre(size: int, generator: torch.Generator) -> np.ndarray:
    """The central square, with half the image's side."""
    mask = np.zeros((size, size), bool)
    side = size // 2
    start = (size - side) // 2
    mask[start : start + side, start : start + side] = True
    return mask


def _half(size: int, generator: torch.Generator) -> np.ndarray:
    """The right half."""
    mask = np.zeros((size, size), bool)
    mask[:, size // 2 :] = True
    return mask


def _lines(size: int, generator: torch.Generator) -> np.ndarray:
    """Every other row, starting with the second."""
    mask = np.zeros((size, size), bool)
    mask[1::2] = True
    return mask


# Each function takes the image's side (at least 4) and a generator. It returns bool [size, size], neither empty nor full.
MASK_KINDS: dict[str, Draw] = {
    "strokes": partial(_redrawn, _strokes),
    "boxes": partial(_redrawn, _boxes),
    "mixed": partial(_redrawn, _mixed),
    "outpaint": _outpaint,
    "centre": _centre,
    "half": _half,
    "lines": _lines,
}


@dataclass(frozen=True)
class MaskOptions:
    """Masks."""

    mask_kind: str = option(
        "mixed", "kind of the drawn masks; mixed: strokes, boxes or both", choices=MASK_KINDS, common=True
    )


@dataclass(frozen=True)
class MaskSetOptions(MaskOptions):
    """Masks."""

    mask_dir: str = option(
        "",
        "folder of mask images (white: hole), used in the order of their names; default: draw masks from --mask_seed",
        common=True,
    )
    mask_seed: int = option(0, "seed of the drawn masks", minimum=0)


def draw_mask(kind: str, size: int, seed: int, index: int) -> torch.Tensor:
    """Draw mask number `index` of a kind: bool [size, size], True in the hole. The mask depends on the arguments alone.

    Raises:
        UsageError: `size` is below 4.
    """
    if size < 4:
        raise UsageError(f"masks need images of at least 4 x 4 pixels, but --image_size {size} was given")
    return torch.from_numpy(MASK_KINDS[kind](size, generator_for(seed, "mask", index)))


def mask_set(options: MaskSetOptions, size: int) -> Callable[[int], torch.Tensor]:
    """The fixed masks of a test run, as a function that maps an index to bool [size, size].

    A folder's masks are used in turn, starting over after the last. They are resized and cropped like images, but by nearest
    neighbor. Pixels with a gray value of WHITE or more are in the hole.

    Raises:
        UsageError: the folder has no images. The returned function raises it too, if a mask cannot be read, is empty or
            covers the whole image.
    """
    if not options.mask_dir:
        return lambda index: draw_mask(options.mask_kind, size, options.mask_seed, index)
    paths = list_files(Path(options.mask_dir), IMAGE_SUFFIXES, "mask images")
    return lambda index: _read_mask(paths[index % len(paths)], size)


def hole_ratio(masks: torch.Tensor) -> torch.Tensor:
    """The share of hole pixels, float32 [...], in masks bool [..., H, W]."""
    return masks.float().mean((-2, -1))


def _read_mask(path: Path, size: int) -> torch.Tensor:
    try:
        image = open_rgb(path, str(path))
    except BadImageError as error:
        raise UsageError(f"cannot read the mask {path}: {error.reason}") from error
    mask = crop_map(image.convert("L"), size) >= WHITE
    if mask.all() or not mask.any():
        found = "everything" if mask.any() else "nothing"
        raise UsageError(f"the mask {path} covers {found} at {size} x {size}: expected a white hole on black")
    return torch.from_numpy(mask)


@dataclass(frozen=True)
class SheetOptions:
    """Sheet of masks."""

    size: int = option(64, "side of the masks in pixels", minimum=4, maximum=4096)
    count: int = option(1000, "masks of each kind over which hole ratios are computed", minimum=SHEET_COLUMNS)
    seed: int = option(0, "seed of the masks", minimum=0)


def main() -> None:
    """Draw a picture with one row of masks per kind, and print the hole ratios."""
    path, words = leading_word("OUT.png, the picture to write")
    options = parse_options(str(__doc__).splitlines()[0], [SheetOptions], words, positional="OUT.png")[SheetOptions]
    rows = []
    for kind in MASK_KINDS:
        masks = torch.stack([draw_mask(kind, options.size, options.seed, index) for index in range(options.count)])
        ratios = hole_ratio(masks)
        show(f"{kind:9} mean {ratios.mean():.3f}, from {ratios.min():.3f} to {ratios.max():.3f}")
        rows.append(masks[:SHEET_COLUMNS, None].float())
    sheet = make_grid(torch.cat(rows), nrow=SHEET_COLUMNS, padding=2, pad_value=0.5)
    with atomic_path(path) as temporary:
        Image.fromarray((255 * sheet[0]).byte().numpy()).save(temporary, format="PNG")


if __name__ == "__main__":
    exit_cleanly(main)
