"""Image sets to score: a dataset split, a folder, an .npz file or an LMDB. Threads read the images ahead of use."""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from datasets_prep.datasets import ImageDataset, crop_padding
from datasets_prep.folders import list_files
from datasets_prep.images import IMAGE_SUFFIXES, center_crop
from datasets_prep.lmdb_file import image_keys, open_lmdb_file
from options import UsageError
from runtime.distributed import Processes
from runtime.files import UNREADABLE
from runtime.progress import progress_bar

__all__ = ["ImageSource", "dataset_source", "decode", "image_batches", "open_source", "transformed"]

READER_THREADS = 8
NPZ_KEYS = ("images", "arr_0")  # arr_0 is used by ADM's evaluation


@dataclass(frozen=True)
class ImageSource:
    """A set of images that can be read by index.

    Attributes:
        name: short name, used in file names and progress bars.
        count: number of images.
        read: returns the image with an index in 0..count - 1, as uint8 [C, H, W].
        meta: JSON-serializable description of the images, with a fingerprint.
        names: for a folder, the files' relative paths without suffix; otherwise empty.
    """

    name: str
    count: int
    read: Callable[[int], torch.Tensor]
    meta: dict[str, Any]
    names: tuple[str, ...] = ()


def dataset_source(dataset: ImageDataset) -> ImageSource:
    """Open a dataset split. Padding that the dataset added is cropped."""
    facts = dataset.facts
    meta = {"dataset": facts.name, "split": dataset.split, "image_size": facts.image_size}
    return ImageSource(
        f"{facts.name}_{dataset.split}_{facts.image_size}",
        len(dataset),
        lambda index: crop_padding(dataset[index], facts),
        {**meta, "fingerprint": dataset.fingerprint},
    )


def open_source(path: str | Path, image_size: int | None = None) -> ImageSource:
    """Open the images in a folder (including subfolders), an .npz file of uint8 [N, H, W, C], or an LMDB in key order.

    Like pytorch_fid, images from folders and LMDBs are converted to RGB and not cropped. With `image_size`, they are also
    resized and center-cropped, as for datasets.

    Raises:
        UsageError: `path` is missing or has another format. Reading an image may also raise it, with the file's name.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _open_npz(path)
    if (path / "data.mdb").is_file() or (path.suffix == ".lmdb" and path.is_file()):
        return _open_lmdb(path, image_size)
    if path.is_dir():
        return _open_folder(path, image_size)
    raise UsageError(
        f"{path}: expected a folder of images, an LMDB, an .npz file of images or statistics, or an .npy file of statistics"
    )


def transformed(
    source: ImageSource, transform: Callable[[torch.Tensor], torch.Tensor], image_format: str
) -> ImageSource:
    """Apply `transform`, which maps batches uint8 [B, C, H, W], to all images. `image_format` is its name in `meta`."""

    def read(index: int) -> torch.Tensor:
        return transform(source.read(index)[None])[0]

    return ImageSource(source.name, source.count, read, {**source.meta, "image_format": image_format})


def image_batches(
    source: ImageSource,
    batch_size: int,
    processes: Processes = Processes(),  # noqa: B008
) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
    """Yield all images in order, as batches uint8 [B, C, H, W] with their indices.

    A batch ends early where the image size changes. With several processes, each reads its own share of the batches.
    """
    starts = processes.share(range(0, source.count, batch_size))
    with (
        ThreadPoolExecutor(READER_THREADS) as readers,
        progress_bar(total=source.count // processes.count, desc=f"processing {source.name}", unit="image") as progress,
    ):

        def request(start: int) -> list[Any]:
            return [readers.submit(source.read, i) for i in range(start, min(start + batch_size, source.count))]

        ahead = request(starts[0]) if starts else []
        for start, following in zip_longest(starts, starts[1:]):
            current, ahead = ahead, [] if following is None else request(following)
            for images, indices in _stacked([item.result() for item in current], start):
                yield images, indices
                progress.update(len(images))


def _stacked(images: list[torch.Tensor], start: int) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
    first = 0
    for index in range(1, len(images) + 1):
        if index == len(images) or images[index].shape != images[first].shape:
            yield torch.stack(images[first:index]), range(start + first, start + index)
            first = index


def _open_folder(folder: Path, image_size: int | None) -> ImageSource:
    paths = list_files(folder, IMAGE_SUFFIXES)
    state = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)
    meta = {"folder": str(folder), "fingerprint": hashlib.sha256(state.encode()).hexdigest()}
    names = tuple(path.relative_to(folder).with_suffix("").as_posix() for path in paths)
    return ImageSource(
        folder.name, len(paths), lambda index: decode(paths[index], str(paths[index]), image_size), meta, names
    )


def _open_npz(path: Path) -> ImageSource:
    try:
        with np.load(path, allow_pickle=False) as content:
            images = next((content[key] for key in NPZ_KEYS if key in content), None)
    except UNREADABLE as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if images is None or images.dtype != np.uint8 or images.ndim != 4:
        raise UsageError(f"{path}: expected uint8 images [N, H, W, C] in the array {' or '.join(NPZ_KEYS)}")
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    meta = {"file": str(path), "fingerprint": hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()}
    return ImageSource(path.stem, len(tensor), tensor.__getitem__, meta)


def _open_lmdb(path: Path, image_size: int | None) -> ImageSource:
    file = open_lmdb_file(path)
    stored = list(file.keys())
    keys = [stored[number] for number in image_keys(stored, image_size, str(path))]
    if not keys:
        raise UsageError(f"the LMDB {path} contains no images")

    def read(index: int) -> torch.Tensor:
        return _decode_value(file.get(keys[index]) or b"", f"{keys[index]!r} in {path}", image_size)

    meta = {"lmdb": str(path), "fingerprint": file.fingerprint(np.array(keys))}
    return ImageSource(path.name, len(keys), read, meta)


def _decode_value(value: bytes, name: str, image_size: int | None) -> torch.Tensor:
    """Decode an LMDB value: an encoded image or the raw RGB bytes of a square image."""
    try:
        return decode(io.BytesIO(value), name, image_size)
    except UsageError:
        side = int(np.sqrt(len(value) / 3))
        if len(value) != 3 * side * side or not value:
            raise
        raw = Image.frombytes("RGB", (side, side), value)
        return _as_tensor(raw, image_size)


def decode(file: str | Path | BinaryIO, name: str, image_size: int | None = None) -> torch.Tensor:
    """Decode an image to uint8 [3, H, W]. With `image_size`, resize and center-crop it.

    Raises:
        UsageError: the image cannot be decoded. The message contains `name`.
    """
    try:
        with Image.open(file) as image:
            return _as_tensor(image.convert("RGB"), image_size)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UsageError(f"cannot read the image {name}: {error}") from error


def _as_tensor(image: Image.Image, image_size: int | None) -> torch.Tensor:
    values = np.array(image) if image_size is None else center_crop(image, image_size)
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()
