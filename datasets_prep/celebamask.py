"""Merge CelebAMask-HQ's masks of single parts into maps of 19 classes.

    python -m datasets_prep.celebamask DATADIR

DATADIR is the folder CelebAMask-HQ or the one that holds it. For each image i it writes `masks/<i>.png`, grey values 0 to 18
(background, skin, nose, ...): the parts are painted in the published order, wherever their mask is not black, so that
later ones cover earlier ones. Maps that are there already are kept, so the command continues after an interruption.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from command_line import leading_word, parse_options
from datasets_prep.label_maps.celebamask_hq import MAPS, PARTS, find_celebamask, numbered_images
from options import UsageError, exit_cleanly, option
from runtime.files import atomic_path
from runtime.progress import progress_bar

__all__ = ["MergeOptions", "main", "merge_parts", "merge_tree"]

ANNOTATIONS = "CelebAMask-HQ-mask-anno"
IMAGES_PER_FOLDER = 2000


@dataclass(frozen=True)
class MergeOptions:
    """Merging."""

    num_workers: int = option(4, "threads that read, merge and write", minimum=1)


def merge_parts(masks: Sequence[np.ndarray | None]) -> np.ndarray:
    """The map uint8 [H, W] of the parts' masks [H, W] in the order of PARTS, None where the face lacks one.

    A pixel has the number, from 1, of the last part whose mask is not zero there, and 0 where there is none.
    """
    merged = np.zeros(next(mask.shape for mask in masks if mask is not None), np.uint8)
    for number, mask in enumerate(masks, start=1):
        if mask is not None:
            merged[mask != 0] = number
    return merged


def merge_tree(tree: Path, num_workers: int) -> tuple[int, int]:
    """Write the maps that are missing in the official tree; returns how many were written and how many there are.

    Raises:
        UsageError: there are no images, or an image has no masks, damaged ones, or ones of several sizes.
    """
    numbers = numbered_images(tree)
    (tree / MAPS).mkdir(exist_ok=True)
    present = {path.name for path in (tree / MAPS).iterdir()}
    missing = [number for number in numbers if f"{number}.png" not in present]
    with ThreadPoolExecutor(num_workers) as workers:
        jobs = workers.map(partial(_merge_image, tree), missing)
        for _ in progress_bar(jobs, total=len(missing), desc="merging maps", unit="image"):
            pass
    return len(missing), len(numbers)


def main() -> None:
    """Take the folder, and merge what is not merged yet."""
    datadir, words = leading_word("DATADIR, the folder that holds CelebAMask-HQ")
    options = parse_options(str(__doc__).splitlines()[0], [MergeOptions], words)[MergeOptions]
    tree = find_celebamask(Path(datadir))
    written, total = merge_tree(tree, options.num_workers)
    print(f"{tree / MAPS}: {total} maps, of which {written} are new")


def _merge_image(tree: Path, number: int) -> None:
    folder = tree / ANNOTATIONS / str(number // IMAGES_PER_FOLDER)
    paths = [folder / f"{number:05d}_{part}.png" for part in PARTS]
    masks = [_read_part(path) if path.is_file() else None for path in paths]
    sizes = {mask.shape for mask in masks if mask is not None}
    if len(sizes) != 1:
        found = f"found masks of several sizes, {sorted(sizes)}" if sizes else "found none"
        raise UsageError(f"image {number}: expected masks {folder}/{number:05d}_<part>.png of one size, but {found}")
    with atomic_path(tree / MAPS / f"{number}.png") as temporary:
        Image.fromarray(merge_parts(masks)).save(temporary, format="PNG")


def _read_part(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"cannot read the mask {path}: {error} (damaged? unpack it again)") from error


if __name__ == "__main__":
    exit_cleanly(main)
