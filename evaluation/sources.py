"""Image sets to score: a dataset split, a folder, an .npz file or an LMDB. Threads read the images ahead of use."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from datasets_prep.datasets import ImageDataset, crop_padding
from datasets_prep.folders import list_files
from datasets_prep.image_dataset import shown_side
from datasets_prep.images import IMAGE_SUFFIXES, BadImageError, crop_array, image_extent, read_image
from datasets_prep.lmdb_file import image_keys, open_lmdb_file
from datasets_prep.lmdb_images import LmdbImages
from options import UsageError
from runtime.distributed import Processes
from runtime.files import UNREADABLE
from runtime.progress import progress_bar

__all__ = ["ImageSource", "dataset_source", "holds_images", "image_batches", "open_source", "resized", "transformed"]

READER_THREADS = 8
NPZ_KEYS = ("images", "arr_0")  # arr_0 is used by ADM's evaluation
Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageSource:
    """A set of images that can be read by index.

    Attributes:
        name: short name, used in file names and progress bars.
        count: number of images.
        read: returns the image with an index in 0..count - 1, as uint8 [C, H, W].
        meta: JSON-serializable description of the images, with a fingerprint.
        names: for a folder, the files' relative paths without suffix; otherwise empty.
        measure: returns the height and width of an image, if that is faster than reading it.
    """

    name: str
    count: int
    read: Callable[[int], torch.Tensor]
    meta: dict[str, Any]
    names: tuple[str, ...] = ()
    measure: Callable[[int], tuple[int, int]] | None = None

    def extent(self, index: int) -> tuple[int, int]:
        """The height and width of an image."""
        if self.measure is not None:
            return self.measure(index)
        height, width = self.read(index).shape[1:]
        return height, width


def dataset_source(dataset: ImageDataset) -> ImageSource:
    """Open a dataset split. Padding that the dataset added is cropped."""
    facts = dataset.facts
    meta = {"dataset": facts.name, "split": dataset.split, "image_size": facts.image_size}
    return ImageSource(
        f"{facts.name}_{dataset.split}_{facts.image_size}",
        len(dataset),
        lambda index: crop_padding(dataset[index], facts),
        {**meta, "fingerprint": dataset.fingerprint},
        measure=lambda index: (shown_side(facts), shown_side(facts)),
    )


def open_source(path: str | Path, image_size: int | None = None) -> ImageSource:
    """Open the images in a folder (including subfolders), an .npz file of uint8 [N, H, W, C], or an LMDB in key order.

    Image files are read as for training, by `datasets_prep.images.open_rgb`, but not cropped. With `image_size`, all images
    are resized and center-cropped as for training.

    Raises:
        UsageError: `path` is missing or has another format. Reading an image may also raise it, with the file's name.
    """
    source = _open(Path(path), image_size)
    return source if image_size is None else resized(source, image_size)


def holds_images(path: str | Path) -> bool:
    """Whether `path` is an .npz file with images, which may also hold statistics.

    Raises:
        UsageError: the .npz cannot be read.
    """
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as content:
            return any(key in content for key in NPZ_KEYS)
    except UNREADABLE as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def resized(source: ImageSource, size: int) -> ImageSource:
    """Resize and center-crop all images to `size` x `size` pixels, as `datasets_prep.images.center_crop` does."""

    def read(index: int) -> torch.Tensor:
        image = source.read(index)
        colors = np.ascontiguousarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        try:
            return crop_array(colors, size)[: len(image)]
        except ValueError as error:
            name = source.names[index] if source.names else f"number {index}"
            raise UsageError(f"cannot resize the image {name} of {source.name}: {error} (remove it)") from error

    return dataclasses.replace(source, read=read, measure=lambda index: (size, size))


def transformed(
    source: ImageSource, transform: Callable[[torch.Tensor], torch.Tensor], image_format: str
) -> ImageSource:
    """Apply `transform`, which maps batches uint8 [B, C, H, W], to all images. `image_format` is its name in `meta`."""

    def read(index: int) -> torch.Tensor:
        return transform(source.read(index)[None])[0]

    return dataclasses.replace(source, read=read, meta={**source.meta, "image_format": image_format})


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


def _open(path: Path, image_size: int | None) -> ImageSource:
    if path.is_dir():
        return _open_lmdb(path, image_size) if (path / "data.mdb").is_file() else _open_folder(path)
    if path.suffix == ".npz":
        return _open_npz(path)
    if path.suffix == ".lmdb" and path.is_file():
        return _open_lmdb(path, image_size)
    raise UsageError(
        f"{path}{'' if path.exists() else ' does not exist'}: expected a folder of images, an LMDB, an .npz file of images or "
        "statistics, or an .npy file of statistics"
    )


def _stacked(images: list[torch.Tensor], start: int) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
    first = 0
    for index in range(1, len(images) + 1):
        if index == len(images) or images[index].shape != images[first].shape:
            yield torch.stack(images[first:index]), range(start + first, start + index)
            first = index


def _open_folder(folder: Path) -> ImageSource:
    paths = list_files(folder, IMAGE_SUFFIXES)
    state = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)
    digest = hashlib.sha256(state.encode(errors="surrogateescape")).hexdigest()  # names of files may be any bytes
    meta = {"folder": str(folder), "fingerprint": digest}
    names = tuple(path.relative_to(folder).with_suffix("").as_posix() for path in paths)
    return ImageSource(
        folder.name,
        len(paths),
        _strictly(lambda index: read_image(paths[index], None)),
        meta,
        names,
        _strictly(lambda index: image_extent(paths[index], str(paths[index]))),
    )


def _open_npz(path: Path) -> ImageSource:
    try:
        with np.load(path, allow_pickle=False) as content:
            images = next((content[key] for key in NPZ_KEYS if key in content), None)
            found = ", ".join(content) or "nothing"
    except UNREADABLE as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if images is not None:
        found = f"{images.dtype} {list(images.shape)}"
    if (
        images is None
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] not in (1, 3)
        or not images.size
    ):
        raise UsageError(
            f"{path}: expected images uint8 [N, H, W, 3] (or [N, H, W, 1]) in the array {' or '.join(NPZ_KEYS)}, "
            f"but found {found}"
        )
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    meta = {"file": str(path), "fingerprint": hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()}
    height, width = images.shape[1:3]
    return ImageSource(path.stem, len(tensor), tensor.__getitem__, meta, measure=lambda index: (height, width))


def _open_lmdb(path: Path, image_size: int | None) -> ImageSource:
    file = open_lmdb_file(path)
    stored = list(file.keys())
    keys = [stored[number] for number in image_keys(stored, image_size, str(path))]
    if not keys:
        raise UsageError(f"the LMDB {path} contains no images")
    images = LmdbImages(file, keys)
    meta = {"lmdb": str(path), "fingerprint": file.fingerprint(np.array(keys))}
    read = _strictly(lambda index: images.read(index, None))
    return ImageSource(path.name, len(keys), read, meta, measure=_strictly(images.extent))


def _strictly(read: Callable[[int], Result]) -> Callable[[int], Result]:
    """Read from a set that must be complete, so that errors do not offer --skip_bad_images."""

    def strict(index: int) -> Result:
        try:
            return read(index)
        except BadImageError as error:
            raise UsageError(f"cannot read the image {error.image}: {error.reason} (repair or remove it)") from error

    return strict
