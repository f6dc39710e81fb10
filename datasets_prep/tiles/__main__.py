"""Cut pictures into square tiles at several scales, so that a few large photographs train an autoencoder.

    python -m datasets_prep.tiles --source photographs --output tiles --tile_size 64 --scales 64 128 256 512

A picture is reduced so that its shorter side has each scale's pixels, and the whole is covered by tiles that overlap as
little as possible. Scales larger than the picture are left out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image

from command_line import parse_options
from datasets_prep.folders import list_files
from datasets_prep.images import IMAGE_SUFFIXES, LARGEST_SIZE, open_rgb
from exits import exit_cleanly
from options import UsageError, option
from runtime.messages import show
from runtime.outputs import check_folder
from runtime.progress import progress_bar

__all__ = ["TileOptions", "cut_tiles", "main"]


@dataclass(frozen=True)
class TileOptions:
    """Tiles."""

    source: str = option("", "folder of pictures, searched recursively")
    output: str = option("", "new folder for the tiles, as PNG files")
    tile_size: int = option(64, "side of a tile in pixels", minimum=1, maximum=LARGEST_SIZE)
    scales: tuple[int, ...] = option(
        (64, 128, 256, 512), "pixels of a picture's shorter side, at each of which it is cut", minimum=1
    )


def main() -> None:
    """Parse the flags, and cut every picture."""
    options = parse_options(str(__doc__), [TileOptions])[TileOptions]
    source, output = Path(options.source), Path(options.output)
    if not options.source or not source.is_dir():
        raise UsageError(f"--source {options.source or '(missing)'}: expected a folder of pictures")
    if not options.output or output.exists():
        raise UsageError(f"--output {options.output or '(missing)'}: expected the name of a new folder")
    if min(options.scales) < options.tile_size:
        raise UsageError(f"--scales {min(options.scales)} is smaller than a tile of {options.tile_size} pixels")
    check_folder(output.parent, "--output")
    files = list_files(source, IMAGE_SUFFIXES)
    if not files:
        raise UsageError(f"--source {source} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
    output.mkdir()
    count = 0
    for number, path in enumerate(progress_bar(files, desc="tiles", unit="picture")):
        for tile in cut_tiles(open_rgb(path, str(path)), options.tile_size, options.scales):
            tile.save(output / f"{number:05}_{count:07}.png")
            count += 1
    show(f"cut {len(files):,} pictures into {count:,} tiles of {options.tile_size} pixels in {output}")


def cut_tiles(picture: Image.Image, size: int, scales: tuple[int, ...]) -> Iterator[Image.Image]:
    """Yield the tiles of one picture, size x size pixels, from the smallest scale on.

    Args:
        picture: RGB, of any size.
        size: side of a tile.
        scales: pixels of the shorter side, at least `size`.
    """
    for scale in sorted(scales):
        shorter = min(picture.size)
        if scale > shorter:
            return
        width, height = (round(side * scale / shorter) for side in picture.size)
        reduced = picture.resize((width, height), Image.Resampling.LANCZOS)
        for top, left in product(_starts(height, size), _starts(width, size)):
            yield reduced.crop((left, top, left + size, top + size))


def _starts(length: int, size: int) -> list[int]:
    """First pixels of the fewest tiles that cover `length` pixels, evenly spaced."""
    count = math.ceil(length / size)
    return [round(number * (length - size) / max(1, count - 1)) for number in range(count)]


if __name__ == "__main__":
    exit_cleanly(main)
