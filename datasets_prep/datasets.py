"""The datasets by name: images uint8 [C, H, W], labels, and the facts about them that training and scoring need."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from datasets_prep.idx import find_idx_folder, read_idx
from datasets_prep.images import IMAGE_SUFFIXES, read_image
from options import UsageError, option
from runtime.progress import progress_bar

__all__ = ["DATASETS", "DatasetFacts", "DatasetOptions", "ImageDataset", "crop_padding", "open_dataset"]

Split = Literal["train", "validation"]

FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IDX_SIDE = 28
HELD_OUT_EVERY = 20  # a folder without a validation folder holds out every twentieth image


@dataclass(frozen=True)
class DatasetOptions:
    """Data."""

    dataset: str = option("fashion_mnist", "dataset: fashion_mnist, mnist, or folder (any directory of images)")
    datadir: str = option("./data", "directory of the dataset's files; also holds the latent caches")
    image_size: int = option(32, "side of the square images in pixels", minimum=1)
    skip_bad_images: bool = option(False, "leave unreadable images out, with a count, instead of stopping")


@dataclass(frozen=True)
class DatasetFacts:
    """What a checkpoint remembers of its data.

    `crop` is the side that samples are cropped back to (None: no padding was added); `flips` tells whether mirror images
    belong to the distribution.
    """

    name: str
    image_size: int
    channels: int
    crop: int | None
    flips: bool
    class_names: tuple[str, ...]


class ImageDataset:
    """Images uint8 [C, H, W] by index, labels int64 [N] (zeros without classes), facts and a fingerprint of the files."""

    def __init__(
        self,
        facts: DatasetFacts,
        split: Split,
        labels: np.ndarray,
        read: Callable[[int], torch.Tensor],
        fingerprint: str,
    ) -> None:
        self.facts = facts
        self.split = split
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.fingerprint = fingerprint
        self._read = read

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._read(index)

    def head(self, count: int) -> "ImageDataset":
        """The first `count` images."""
        labels = self.labels[:count].numpy()
        return ImageDataset(self.facts, self.split, labels, self._read, f"{self.fingerprint}[:{len(labels)}]")


def open_dataset(options: DatasetOptions, split: Split) -> ImageDataset:
    """Open one split of the dataset that `options` names.

    Raises:
        UsageError: unknown name, missing or empty folder, an image size that the dataset does not admit.
    """
    if options.dataset not in DATASETS:
        raise UsageError(f"unknown dataset {options.dataset!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[options.dataset](options, split)


def crop_padding(images: torch.Tensor, facts: DatasetFacts) -> torch.Tensor:
    """Images [B, C, H, W] without the padding that the dataset added."""
    if facts.crop is None:
        return images
    border = (facts.image_size - facts.crop) // 2
    return images[..., border : border + facts.crop, border : border + facts.crop]


def _open_idx(options: DatasetOptions, split: Split) -> ImageDataset:
    border, odd = divmod(options.image_size - IDX_SIDE, 2)
    if border < 0 or odd:
        raise UsageError(
            f"{options.dataset} has {IDX_SIDE} x {IDX_SIDE} images, padded to an even larger --image_size such as 32, "
            f"but --image_size {options.image_size} was given"
        )
    folder = find_idx_folder(options.dataset, Path(options.datadir))
    prefix = "train" if split == "train" else "t10k"
    images, labels = read_idx(folder, f"{prefix}-images-idx3-ubyte"), read_idx(folder, f"{prefix}-labels-idx1-ubyte")
    if images.shape[1:] != (IDX_SIDE, IDX_SIDE) or labels.shape != images.shape[:1]:
        raise UsageError(
            f"{folder}: expected [N, 28, 28] images with N labels, found {images.shape} and {labels.shape}"
        )
    if labels.max() > 9:
        raise UsageError(f"{folder}: labels must lie in 0..9, but {labels.max()} was found")
    names = FASHION_CLASSES if options.dataset == "fashion_mnist" else tuple("0123456789")
    facts = DatasetFacts(options.dataset, options.image_size, 1, IDX_SIDE if border else None, False, names)
    pixels = functional.pad(torch.from_numpy(images.copy())[:, None], [border] * 4)
    return ImageDataset(facts, split, labels, pixels.__getitem__, hashlib.sha256(images.tobytes()).hexdigest())


def _open_folder(options: DatasetOptions, split: Split) -> ImageDataset:
    root = Path(options.datadir)
    if not root.is_dir():
        raise UsageError(f"--datadir {root} is no directory: name the folder that holds the images")
    named = {"train": ["train"], "validation": ["validation", "val", "test"]}
    folders = {key: next((root / n for n in names if (root / n).is_dir()), None) for key, names in named.items()}
    separate = None not in folders.values()
    base = (folders[split] if separate else None) or root
    paths = _image_files(base)
    if not separate and (train := folders["train"]) and all(path.is_relative_to(train) for path in paths):
        base = train
    # A label is a place in the list of the training images' classes, whichever images a split holds or leaves out.
    classes = _class_names(folders["train"]) if separate and folders["train"] else _class_names(base)
    if not separate and len(paths) > 1:
        every = min(HELD_OUT_EVERY, len(paths))
        paths = [p for i, p in enumerate(paths) if (i % every == every - 1) == (split == "validation")]
    if options.skip_bad_images:
        paths = _readable(paths, options.image_size)
    labels = np.array([_label(path, base, classes) for path in paths])
    state = "\n".join(f"{path.relative_to(root)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)
    facts = DatasetFacts("folder", options.image_size, 3, None, True, tuple(classes))
    return ImageDataset(
        facts,
        split,
        labels,
        lambda index: read_image(paths[index], options.image_size),
        hashlib.sha256(state.encode()).hexdigest(),
    )


def _image_files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise UsageError(f"no images in {folder}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return paths


def _class_names(folder: Path) -> list[str]:
    """The names of the folders that hold all images; none where an image lies beside them."""
    parts = [path.relative_to(folder).parts for path in _image_files(folder)]
    return [] if any(len(names) == 1 for names in parts) else sorted({names[0] for names in parts})


def _label(path: Path, base: Path, classes: list[str]) -> int:
    if not classes:
        return 0
    name = path.relative_to(base).parts[0]
    if name not in classes:
        raise UsageError(f"{path} belongs to none of the training images' classes ({', '.join(classes)})")
    return classes.index(name)


def _readable(paths: list[Path], size: int) -> list[Path]:
    kept, bad = [], []
    for path in progress_bar(paths, desc="checking images", unit="image"):
        try:
            read_image(path, size)
            kept.append(path)
        except UsageError:
            bad.append(path)
    if bad:
        print(f"--skip_bad_images: left out {len(bad)} of {len(paths)} images: {', '.join(map(str, bad[:10]))}")
    if not kept:
        raise UsageError(f"none of the {len(paths)} images can be read, the first is {paths[0]}")
    return kept


DATASETS: dict[str, Callable[[DatasetOptions, Split], ImageDataset]] = {
    "fashion_mnist": _open_idx,
    "mnist": _open_idx,
    "folder": _open_folder,
}
