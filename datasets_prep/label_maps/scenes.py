"""Scenes with label maps: ADE20K's scene parsing benchmark (Zhou et al. 2017) and COCO-Stuff (Caesar et al. 2018).

ADEChallengeData2016/images/{training,validation}/*.jpg         ids 1 to 150, and 0 for unlabeled pixels: 151 classes
ADEChallengeData2016/annotations/{training,validation}/*.png
{train2017,val2017}/*.jpg                                       ids 0 to 181, and 255 for unlabeled pixels: 182 classes
stuffthingmaps/{train2017,val2017}/*.png
"""

import re
from pathlib import Path
from typing import NamedTuple

from datasets_prep.folder_layout.entries import is_junk
from datasets_prep.image_dataset import DatasetFacts, Split
from datasets_prep.label_maps.segmented_dataset import MapClasses, SegmentedDataset
from datasets_prep.label_maps.segmented_files import open_segmented_files
from options import UsageError

__all__ = ["open_ade20k", "open_coco"]

ADE_TREE, ADE_NAMES, ADE_CLASSES = "ADEChallengeData2016", "objectInfo150.txt", 150
ADE_SPLITS: dict[Split, str] = {"train": "training", "validation": "validation"}
COCO_TREE, COCO_NAMES, COCO_CLASSES = "coco", "labels.txt", 182
COCO_SPLITS: dict[Split, str] = {"train": "train2017", "validation": "val2017"}


class _Folders(NamedTuple):
    """The folders of a split's images (.jpg) and maps (.png, with the same names) below `tree`."""

    tree: Path
    images: str
    maps: str


def open_ade20k(name: str, datadir: Path, split: Split, image_size: int) -> SegmentedDataset:
    """Open ADE20K with 151 classes, where 0 means unlabeled. `datadir` is the tree ADEChallengeData2016 or its parent.

    Raises:
        UsageError: a folder is missing or empty, or an image has no map.
    """
    part = ADE_SPLITS[split]
    folders = _find(name, datadir, ADE_TREE, f"images/{part}", f"annotations/{part}")
    names = _names_by_number(folders.tree / ADE_NAMES, r"(\d+)\t.*\t([^\t]+)")
    classes = MapClasses(("unlabelled", *_class_names(names, ADE_CLASSES)), scored=False)
    return _as_dataset(name, split, image_size, folders, classes)


def open_coco(name: str, datadir: Path, split: Split, image_size: int) -> SegmentedDataset:
    """Open COCO-Stuff with 182 classes. Unlabeled pixels keep the id NO_CLASS. The tree is `datadir` or `datadir`/coco.

    Raises:
        UsageError: a folder is missing or empty, or an image has no map.
    """
    part = COCO_SPLITS[split]
    folders = _find(name, datadir, COCO_TREE, part, f"stuffthingmaps/{part}")
    # The official list counts from 1, the maps from 0.
    names = _names_by_number(folders.tree / COCO_NAMES, r"(\d+): (.+)")
    classes = MapClasses(_class_names(names, COCO_CLASSES), background=False)
    return _as_dataset(name, split, image_size, folders, classes)


def _find(name: str, datadir: Path, tree: str, images: str, maps: str) -> _Folders:
    for root in (datadir / tree, datadir):
        if (root / images).is_dir() and (root / maps).is_dir():
            return _Folders(root, images, maps)
    raise UsageError(
        f"{name}: expected the folders {images} and {maps} in {datadir} or {datadir / tree} (see docs/datasets.md)"
    )


def _names_by_number(path: Path, line: str) -> dict[int, str]:
    """Read class names by number from the dataset's list, if it exists. `line` is the regular expression of an entry."""
    if not path.is_file():
        return {}
    matches = (re.fullmatch(line, text) for text in path.read_text(encoding="utf-8").splitlines())
    return {int(match[1]): match[2].strip() for match in matches if match}


def _class_names(names: dict[int, str], count: int) -> tuple[str, ...]:
    return tuple(names.get(number, f"class {number}") for number in range(1, count + 1))


def _as_dataset(name: str, split: Split, image_size: int, folders: _Folders, classes: MapClasses) -> SegmentedDataset:
    images = sorted(path for path in (folders.tree / folders.images).glob("*.jpg") if not is_junk(path.name))
    if not images:
        raise UsageError(f"{name}: no images in {folders.tree / folders.images}: expected files ending in .jpg")
    maps = [folders.tree / folders.maps / f"{path.stem}.png" for path in images]
    facts = DatasetFacts(name, image_size, 3, None, True, ())
    return open_segmented_files(facts, split, folders.tree, images, maps, classes)
