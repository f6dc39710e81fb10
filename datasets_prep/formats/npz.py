"""ADM's reference batches (Dhariwal & Nichol 2021): .npz files with images uint8 [N, H, W, 3] in `arr_0`, labels in `arr_1`.

The arrays may be named `images` and `labels` instead. An uncompressed array is memory-mapped. Files that hold only statistics
(`mu`, `sigma`) are for scoring.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets_prep.formats.archives import content_offset
from datasets_prep.formats.content import Content, as_dataset
from datasets_prep.formats.shards import FileBytes, Shards, find_shards, fingerprint_of
from datasets_prep.image_dataset import ImageDataset, Split
from datasets_prep.images import crop_array
from options import UsageError
from runtime.files import UNREADABLE

__all__ = ["find_batches", "open_batches"]

IMAGE_ARRAYS = ("arr_0", "images")
LABEL_ARRAYS = ("arr_1", "labels")
STATISTICS = ("mu", "sigma")


def find_batches(datadir: Path) -> Shards | None:
    """The .npz files in `datadir` that hold a batch of images or statistics; None if there are none."""
    return find_shards(datadir, (".npz",), _is_batch)


def open_batches(name: str, shards: Shards, split: Split, image_size: int) -> ImageDataset:
    """Open a split.

    Raises:
        UsageError: a file is damaged, or holds only statistics or arrays of other shapes.
    """
    train = _read_content(shards.train, shards.root)
    own = train if shards.of_split(split) is shards.train else _read_content(shards.held_out, shards.root)
    return as_dataset(name, shards, split, image_size, train, own)


def _is_batch(path: Path) -> bool:
    """Whether an .npz file holds the arrays of a batch, or cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return any(name in content.files for name in IMAGE_ARRAYS) or set(STATISTICS) <= set(content.files)
    except UNREADABLE:
        return True


def _read_content(paths: list[Path], root: Path) -> Content:
    read = [_read_batch(path) for path in paths]
    starts = np.cumsum([0, *(len(images) for images, _ in read)])
    labelled = all(labels is not None for _, labels in read)
    labels = [label for _, own in read for label in own] if labelled else [None] * int(starts[-1])  # type: ignore[union-attr]

    def image(row: int, size: int) -> torch.Tensor:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        pixels = np.asarray(read[number][0][row - int(starts[number])])
        return crop_array(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels, size)

    names = " or ".join(LABEL_ARRAYS)
    source = f"from the array {names}" if labelled else f"in an array {names}"
    return Content(labels, fingerprint_of(paths, root), source, image=image)


def _read_batch(path: Path) -> tuple[np.ndarray, list[int] | None]:
    """The images uint8 [N, H, W, 1 or 3] in a file, and their labels.

    Raises:
        UsageError: see `open_batches`.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            names = content.files
            key = next((name for name in IMAGE_ARRAYS if name in names), None)
            images: Any = None if key is None else _mapped(path, f"{key}.npy")
            images = content[key] if images is None and key is not None else images
            labels = next((content[name] for name in LABEL_ARRAYS if name in names), None)
    except UNREADABLE as error:
        raise UsageError(f"cannot read {path}: {error}; download it again") from error
    if images is None and set(STATISTICS) <= set(names):
        raise UsageError(
            f"{path} holds only statistics ({', '.join(names)}), but expected images in {IMAGE_ARRAYS[0]}: statistics are for "
            "scoring (--real_img_dir, or pytorch_fid/fid_score.py)"
        )
    if (
        images is None
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] not in (1, 3)
        or not images.size
    ):
        found = ", ".join(names) if images is None else f"{images.dtype} {list(images.shape)}"
        raise UsageError(
            f"{path}: expected images uint8 [N, H, W, 3] in {IMAGE_ARRAYS[0]}, but found {found or 'nothing'}"
        )
    if labels is None:
        return images, None
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UsageError(
            f"{path}: expected class ids [{len(images)}] in {LABEL_ARRAYS[0]}, one for each image, but found {labels.dtype} "
            f"{list(labels.shape)}"
        )
    return images, labels.tolist()


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """Memory-map an uncompressed array of an .npz file; None if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(member)
    if entry.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(content_offset(FileBytes([path]), entry))
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if fortran or dtype.hasobject:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape)
