"""Folders and zip files of EDM2 (Karras et al. 2024, arXiv:2312.02696) and REPA (Yu et al. 2024, arXiv:2410.06940).

A folder holds `images/` (`<5 digits>/img<8 digits>.png`), `vae-sd/` (`<5 digits>/img-mean-std-<8 digits>.npy`) or both, each
with `dataset.json`: {"labels": [["00000/img-mean-std-00000000.npy", 3], ...]}. Each may be a zip file instead (`images.zip`,
`vae-sd.zip`). An array holds the mean and the standard deviation of a posterior, [2 c, h, w], unscaled.

If a folder holds both, training uses the latents, and scores use the images. Mirror images have no latents.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from datasets_prep.folder_layout.entries import examples, holds_files, is_junk, subfolders
from datasets_prep.folder_layout.label_files import label_value
from datasets_prep.formats.archives import Archive, open_archive
from datasets_prep.formats.content import Content, as_dataset
from datasets_prep.formats.shards import Shards
from datasets_prep.image_dataset import ImageDataset, Split
from datasets_prep.images import IMAGE_SUFFIXES, decode_image
from datasets_prep.latents import READERS, parse_array
from models.autoencoders.pretrained import LOGVAR_RANGE
from options import UsageError
from runtime.files import UNREADABLE

__all__ = ["find_edm_folders", "open_edm_folders"]

ARRAY = re.compile(r"img-mean-std-(\d+)\.npy")
NUMBER = re.compile(r"(\d+)(?:\.\w+)?$")
LABEL_FILE = "dataset.json"
PROBED = 20  # folders that are searched for arrays


def find_edm_folders(datadir: Path) -> Shards | None:
    """Find the folder or zip file of latents below `datadir`, and images next to it; None if there are no latents.

    A zip file of images alone is found too. Folders of images alone are read as any other folder.
    """
    if datadir.is_file():
        return Shards(datadir.parent, [datadir]) if datadir.suffix.lower() == ".zip" else None
    if not datadir.is_dir():
        return None
    if _holds_arrays(datadir):
        return Shards(datadir.parent, [datadir])
    zips = sorted(datadir / name for name in os.listdir(datadir) if name.lower().endswith(".zip") and not is_junk(name))  # noqa: PTH208
    entries = [*(datadir / name for name in subfolders(datadir)), *zips]
    latents = [path for path in entries if path.stem.startswith("vae") and (path.is_file() or _holds_arrays(path))]
    images = [path for path in entries if path.stem == "images"]
    if len(latents) > 1:
        names = ", ".join(path.name for path in latents)
        raise UsageError(f"{datadir} holds several folders of latents ({names}): name one of them with --datadir")
    if latents:
        return Shards(datadir, [*latents, *images[:1]])
    return Shards(datadir, zips) if entries == zips[:1] != [] and not holds_files(datadir, IMAGE_SUFFIXES) else None


def open_edm_folders(name: str, shards: Shards, split: Split, image_size: int) -> ImageDataset:
    """Open a split: every twentieth image is held out.

    Raises:
        UsageError: an archive or `dataset.json` is damaged, an image has no label or no latent, or shapes differ.
    """
    archives = [open_archive(path) for path in shards.train]
    first = _sorted_names(archives[0], (".npy",)) or _sorted_names(archives[0], IMAGE_SUFFIXES)
    if not first:
        raise UsageError(f"{archives[0].path}: expected images or {ARRAY.pattern}, but found neither")
    labels, source = _read_labels(archives, first, shards.root)
    state = "\n".join([*(each.fingerprint() for each in archives), json.dumps(labels)])
    content = Content(labels, hashlib.sha256(state.encode()).hexdigest(), source)
    if first[0].endswith(".npy"):
        paired = _images_of(archives[1], first, archives[0].path) if len(archives) > 1 else None
        content = _with_latents(content, archives[0], first, archives[-1], paired)
    else:
        content = _with_images(content, archives[0], first)
    return as_dataset(name, shards, split, image_size, content, content)


def _with_images(content: Content, archive: Archive, names: list[str]) -> Content:
    def read(index: int, size: int) -> torch.Tensor:
        return decode_image(archive.read(names[index]), size, f"{names[index]} of {archive.path}")

    return Content(content.labels, content.fingerprint, content.source, image=read)


def _with_latents(
    content: Content, archive: Archive, names: list[str], other: Archive, images: list[str] | None
) -> Content:
    shape, readers = _read_array(archive, names[0]).shape, ThreadPoolExecutor(READERS)

    def read(indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            list(readers.map(lambda index: _read_moments(archive, names[index], shape), indices.tolist()))
        )

    found = _with_images(content, other, images).image if images else None
    return Content(content.labels, content.fingerprint, content.source, image=found, latents=read, flips=False)


def _read_moments(archive: Archive, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The mean and log-variance float32 [2 c, h, w] in a file of mean and standard deviation.

    Raises:
        UsageError: the file is damaged or has another shape, or a standard deviation is negative.
    """
    array = _read_array(archive, name)
    if array.shape != shape:
        raise UsageError(f"{name} of {archive.path} has the shape {array.shape}, but the first latent has {shape}")
    mean, std = torch.from_numpy(array).chunk(2)
    if not array.size or not torch.isfinite(mean).all() or not (std >= 0).all() or not std.isfinite().all():
        raise UsageError(
            f"{name} of {archive.path}: expected a finite mean and a standard deviation of at least 0, but found other values; "
            "encode the image again"
        )
    return torch.cat([mean, (2 * std.log()).clamp(*LOGVAR_RANGE)])


def _read_array(archive: Archive, name: str) -> np.ndarray:
    try:
        array = parse_array(archive.read(name))
    except UNREADABLE as error:
        raise UsageError(f"cannot read the latent {name} of {archive.path}: {error}") from error
    if array.ndim != 3 or len(array) % 2:
        raise UsageError(f"{name} of {archive.path}: expected mean and std [2 c, h, w], but found {array.shape}")
    return array


def _images_of(images: Archive, arrays: list[str], latents: Path) -> list[str]:
    """The image of each latent, which has the same number in its name.

    Raises:
        UsageError: there is none.
    """
    numbered = {_number(name): name for name in _sorted_names(images, IMAGE_SUFFIXES)}
    missing = [name for name in arrays if _number(name) not in numbered]
    if missing:
        raise UsageError(
            f"{images.path} lacks the images of {len(missing):,} latents in {latents}, such as {missing[0]}: complete it, or "
            f"name one of the two with --datadir"
        )
    return [numbered[_number(name)] for name in arrays]


def _read_labels(archives: list[Archive], names: list[str], root: Path) -> tuple[list[int | str | None], str]:
    """The label of each of `names`, from the first `dataset.json` that there is, and where they are from.

    Raises:
        UsageError: the file is damaged, or names only some of the files.
    """
    for archive in archives:
        if LABEL_FILE in archive.names():
            return _match_labels(archive.read(LABEL_FILE), names, f"{archive.path}/{LABEL_FILE}")
    if (root / LABEL_FILE).is_file():
        return _match_labels((root / LABEL_FILE).read_bytes(), names, str(root / LABEL_FILE))
    return [None] * len(names), f"in a {LABEL_FILE}, which {archives[0].path} lacks"


def _match_labels(data: bytes, names: list[str], where: str) -> tuple[list[int | str | None], str]:
    try:
        pairs: Any = json.loads(data)["labels"]
        rows = pairs.items() if isinstance(pairs, Mapping) else pairs or ()
        listed = {str(name).replace("\\", "/"): label_value(value) for name, value in rows}
    except UNREADABLE as error:
        raise UsageError(
            f'cannot read {where}: expected {{"labels": [["00000/img00000000.png", 3], ...]}}, but found another ({error})'
        ) from error
    if not listed:
        return [None] * len(names), f"in {where}"
    numbered = {_number(name): label for name, label in listed.items()}
    missing = [name for name in names if name not in listed and _number(name) not in numbered]
    if missing:
        raise UsageError(
            f"{where} has no label for {len(missing):,} of {len(names):,} files ({examples(missing)}): expected one for each; "
            'add them, or set "labels" to null for no classes'
        )
    return [listed[name] if name in listed else numbered[_number(name)] for name in names], f"from {where}"


def _number(name: str) -> int | str:
    """The number in a file's name, which an image shares with its latent; the name without a number."""
    found = NUMBER.search(PurePosixPath(name).name)
    return int(found[1]) if found else name


def _sorted_names(archive: Archive, suffixes: Any) -> list[str]:
    return sorted(name for name in archive.names() if PurePosixPath(name).suffix.lower() in suffixes)


def _holds_arrays(folder: Path) -> bool:
    """Whether a folder or one of its first subfolders holds arrays of mean and standard deviation."""
    places = [folder, *(folder / name for name in subfolders(folder)[:PROBED])]
    return any(ARRAY.fullmatch(name) for place in places for name in os.listdir(place))  # noqa: PTH208
