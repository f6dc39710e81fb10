"""CelebAMask-HQ (Lee et al. 2020): 30,000 faces of 1024 x 1024 pixels, with 512 x 512 label maps of 19 classes.

CelebAMask-HQ/CelebA-HQ-img/<i>.jpg
CelebAMask-HQ/CelebAMask-HQ-mask-anno/<i // 2000>/<i, five digits>_<part>.png    official: one mask per part
CelebAMask-HQ/masks/<i>.png                                                     merged by datasets_prep.celebamask
"""

from pathlib import Path

from datasets_prep.image_dataset import DatasetFacts, Split
from datasets_prep.label_maps.segmented_dataset import MapClasses, SegmentedDataset
from datasets_prep.label_maps.segmented_files import open_segmented_files
from datasets_prep.lmdb_images import HELD_OUT_SHARE
from options import UsageError

__all__ = ["CELEBA_CLASSES", "IMAGES", "MAPS", "PARTS", "find_celebamask", "numbered_images", "open_celebamask"]

# The parts in the order of their ids, which start at 1. Later parts are painted over earlier ones.
PARTS = tuple(
    "skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck cloth".split()
)
NAMES = ("background", *PARTS)
PAIRS = tuple((NAMES.index(f"l_{part}"), NAMES.index(f"r_{part}")) for part in ("eye", "brow", "ear"))
CELEBA_CLASSES = MapClasses(NAMES, PAIRS)
TREE, IMAGES, MAPS = "CelebAMask-HQ", "CelebA-HQ-img", "masks"


def open_celebamask(name: str, datadir: Path, split: Split, image_size: int) -> SegmentedDataset:
    """Open the official tree with merged maps. `datadir` is the tree or its parent.

    The last tenth of the images by number is the validation split: 27000.jpg to 29999.jpg.

    Raises:
        UsageError: the tree is missing, it has too few images to hold out a tenth, or merged maps are missing.
    """
    tree = find_celebamask(datadir)
    numbers = numbered_images(tree)
    held_out = len(numbers) // HELD_OUT_SHARE
    if not held_out:
        raise UsageError(f"{tree / IMAGES} has {len(numbers)} images, too few to hold out a tenth of them")
    chosen = numbers[-held_out:] if split == "validation" else numbers[:-held_out]
    return open_segmented_files(
        DatasetFacts(name, image_size, 3, None, True, ()),
        split,
        tree,
        [tree / IMAGES / f"{number}.jpg" for number in chosen],
        [tree / MAPS / f"{number}.png" for number in chosen],
        CELEBA_CLASSES,
        f"create the maps with: python -m datasets_prep.celebamask {datadir}",
    )


def find_celebamask(datadir: Path) -> Path:
    """Find the official tree: `datadir` or the folder CelebAMask-HQ in it.

    Raises:
        UsageError: neither has a folder of images.
    """
    for tree in (datadir / TREE, datadir):
        if (tree / IMAGES).is_dir():
            return tree
    raise UsageError(
        f"expected the folder {TREE}/{IMAGES} in {datadir}: unpack CelebAMask-HQ.zip there, or name the folder that "
        "holds it (see docs/datasets.md)"
    )


def numbered_images(tree: Path) -> list[int]:
    """List the images' numbers, sorted.

    Raises:
        UsageError: there are none.
    """
    numbers = sorted(int(path.stem) for path in (tree / IMAGES).glob("*.jpg") if path.stem.isdecimal())
    if not numbers:
        raise UsageError(f"no images in {tree / IMAGES}: expected 0.jpg to 29999.jpg")
    return numbers
