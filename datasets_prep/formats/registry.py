"""Other projects' formats, recognized by a directory's contents, so that `--dataset folder --datadir DIR` reads them."""

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from datasets_prep.folder_layout.entries import is_junk
from datasets_prep.formats.edm import find_edm_folders, open_edm_folders
from datasets_prep.formats.lightningdit import find_latent_shards, open_latent_shards
from datasets_prep.formats.npz import find_batches, open_batches
from datasets_prep.formats.shards import Shards
from datasets_prep.formats.tables import find_tables, open_tables
from datasets_prep.formats.webdataset import find_tars, open_tars
from datasets_prep.image_dataset import ImageDataset, Split
from datasets_prep.images import IMAGE_SUFFIXES

__all__ = ["FORMATS", "Format", "recognizing"]

PROBED_FOLDERS = 10_000
SUFFIXES = tuple(IMAGE_SUFFIXES)

Open = Callable[[str, Path, Split, int], ImageDataset]


class Format(NamedTuple):
    """A format.

    Args:
        find: returns a directory's files, or None if it holds none.
        open: opens a split of them.
        with_images: whether a directory may also hold image files. Otherwise, it is then read as a folder of images.
        latents: whether it holds latents.
    """

    find: Callable[[Path], Shards | None]
    open: Callable[[str, Shards, Split, int], ImageDataset]
    with_images: bool = False
    latents: bool = False


# The first format that finds files is read.
FORMATS: dict[str, Format] = {
    "LightningDiT's latents": Format(find_latent_shards, open_latent_shards, with_images=True, latents=True),
    "EDM2's and REPA's folders": Format(find_edm_folders, open_edm_folders, with_images=True, latents=True),
    "WebDataset": Format(find_tars, open_tars),
    "Parquet or Arrow": Format(find_tables, open_tables),
    "ADM's reference batches": Format(find_batches, open_batches),
}


def recognizing(open_other: Open, *, latents: bool = False) -> Open:
    """An opener of any format in FORMATS, or with `latents`, of those for latents.

    If none is found, `open_other` opens the directory.
    """

    def open_any(name: str, datadir: Path, split: Split, image_size: int) -> ImageDataset:
        for each in FORMATS.values():
            if (latents and not each.latents) or (shards := each.find(datadir)) is None:
                continue
            if each.with_images or datadir.is_file() or not _holds_images(datadir):
                return each.open(name, shards, split, image_size)
        return open_other(name, datadir, split, image_size)

    return open_any


def _holds_images(folder: Path) -> bool:
    """Whether one of the first PROBED_FOLDERS folders in `folder`, depth first, holds an image.

    Depth first, an image is usually found in the first class folder, even of thousands.
    """
    for _, folders, files in islice(os.walk(folder), PROBED_FOLDERS):
        folders[:] = [name for name in folders if not is_junk(name)]
        if any(name.lower().endswith(SUFFIXES) and not is_junk(name) for name in files):
            return True
    return False
