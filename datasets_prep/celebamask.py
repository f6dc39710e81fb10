"""Merge CelebAMask-HQ's masks, one per facial part, into label maps of 19 classes.

    python -m datasets_prep.celebamask DATADIR

DATADIR is the folder CelebAMask-HQ or its parent. For each image i, the command writes `masks/<i>.png` with gray values 0 to
18 (background, skin, nose, ...). Each part is painted where its mask is not black. Parts follow the dataset's official order,
and later parts cover earlier ones. Existing maps are kept, so an interrupted command can be repeated to resume.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from command_line import leading_word, parse_options
from datasets_prep.images import MOST_READERS, BadImageError, open_rgb
from datasets_prep.label_maps.celebamask_hq import MAPS, PARTS, find_celebamask, numbered_images
from exits import exit_cleanly
from options import UsageError, option
from runtime.files import atomic_path
from runtime.messages import show
from runtime.outputs import check_folder
from runtime.progress import progress_bar

__all__ = ["MergeOptions", "main", "merge_parts", "merge_tree"]

ANNOTATIONS = "CelebAMask-HQ-mask-anno"
IMAGES_PER_FOLDER = 2000


@dataclass(frozen=True)
class MergeOptions:
    """Merging."""

    num_workers: int = option(4, "threads that read, merge and write masks", minimum=1, maximum=MOST_READERS)


def merge_parts(masks: Sequence[np.ndarray | None]) -> np.ndarray:
    """Merge the masks of one face.

    Args:
        masks: masks [H, W] in the order of PARTS; None for a missing part.

    Returns:
        uint8 [H, W]: the number, counted from 1, of the last part whose mask is nonzero; 0 if there is none.
    """
    merged = np.zeros(next(mask.shape for mask in masks if mask is not None), np.uint8)
    for number, mask in enumerate(masks, start=1):
        if mask is not None:
            merged[mask != 0] = number
    return merged


def merge_tree(tree: Path, num_workers: int) -> tuple[int, int]:
    """Write the missing label maps of the official tree.

    Returns:
        The number of maps written, and the number of all maps.

    Raises:
        UsageError: there are no images, or an image's masks are missing, damaged or of different sizes.
    """
    numbers = numbered_images(tree)
    present = {path.name for path in (tree / MAPS).iterdir()} if (tree / MAPS).is_dir() else set()
    missing = [number for number in numbers if f"{number}.png" not in present]
    if missing:
        check_folder(tree / MAPS, "DATADIR, for example a copy")
    with ThreadPoolExecutor(num_workers) as workers:
        jobs = workers.map(partial(_merge_image, tree), missing)
        for _ in progress_bar(jobs, total=len(missing), desc="merging maps", unit="image"):
            pass
    return len(missing), len(numbers)


def main() -> None:
    """Parse the arguments and write the missing maps."""
    datadir, words = leading_word("DATADIR, the folder that holds CelebAMask-HQ")
    options = parse_options(str(__doc__).splitlines()[0], [MergeOptions], words, positional="DATADIR")[MergeOptions]
    tree = find_celebamask(Path(datadir))
    written, total = merge_tree(tree, options.num_workers)
    show(f"{tree / MAPS}: {total} maps, {written} of them new")


def _merge_image(tree: Path, number: int) -> None:
    folder = tree / ANNOTATIONS / str(number // IMAGES_PER_FOLDER)
    paths = [folder / f"{number:05d}_{part}.png" for part in PARTS]
    masks = [_read_part(path) if path.is_file() else None for path in paths]
    sizes = {mask.shape for mask in masks if mask is not None}
    if len(sizes) != 1:
        found = f"found the sizes {sorted(sizes)}" if sizes else "found none"
        raise UsageError(f"image {number}: expected masks {folder}/{number:05d}_<part>.png of one size, but {found}")
    with atomic_path(tree / MAPS / f"{number}.png") as temporary:
        Image.fromarray(merge_parts(masks)).save(temporary, format="PNG")


def _read_part(path: Path) -> np.ndarray:
    try:
        return np.asarray(open_rgb(path, str(path)).convert("L"))
    except BadImageError as error:
        raise UsageError(f"cannot read the mask {path}: {error.reason}; if it is damaged, unpack it again") from error


if __name__ == "__main__":
    exit_cleanly(main)
