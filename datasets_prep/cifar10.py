"""CIFAR-10 (Krizhevsky 2009) from its Python batches.

The batches are read from `cifar-10-batches-py`. If they are missing, they are unpacked from the archive, which is downloaded
from torchvision's URL if needed. torchvision's reader is not used, because it unpickles the batches and so would run any
code in them.
"""

import hashlib
import tarfile
import urllib.error
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_url

from datasets_prep.image_dataset import DatasetFacts, ImageDataset, Split
from datasets_prep.images import crop_array
from options import UsageError
from runtime.downloads import downloading_into
from runtime.files import UNREADABLE, atomic_path
from runtime.messages import show
from runtime.unpickling import load_numpy_pickle

__all__ = ["open_cifar10"]

SIDE = 32
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
BATCHES: dict[Split, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "validation": ("test_batch",),
}


def open_cifar10(name: str, datadir: Path, split: Split, image_size: int) -> ImageDataset:
    """Open the 50,000 training or 10,000 test images. Sizes other than 32 x 32 are resized.

    Raises:
        UsageError: the files are missing and cannot be downloaded, or are damaged.
    """
    folder = _find_batches(datadir)
    batches = [_read_batch(folder / batch) for batch in BATCHES[split]]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    fingerprint = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def read(index: int) -> torch.Tensor:
        return crop_array(images[index], image_size)

    return ImageDataset(DatasetFacts(name, image_size, 3, None, True, CLASSES), split, labels, read, fingerprint)


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images uint8 [N, 32, 32, 3] and labels int64 [N]."""
    try:
        with path.open("rb") as file:
            content = load_numpy_pickle(file)
        data, labels = np.asarray(content["data"]), np.asarray(content["labels"], dtype=np.int64)
    except UNREADABLE as error:
        raise UsageError(f"cannot read {path}: {error}; if it is damaged, delete it to unpack it again") from error
    if data.dtype != np.uint8 or data.shape != (len(labels), 3 * SIDE * SIDE) or labels.ndim != 1 or not len(labels):
        raise UsageError(
            f"{path}: expected uint8 data [N, 3072] with N labels, but found {data.dtype} {data.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise UsageError(f"{path}: expected labels 0 to 9, but found {labels.min()} to {labels.max()}")
    return data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels


def _find_batches(datadir: Path) -> Path:
    names = [name for split in BATCHES.values() for name in split]
    for folder in (datadir / FOLDER, datadir):
        if all((folder / name).is_file() for name in names):
            return folder
    archive = datadir / ARCHIVE
    if not archive.is_file():
        _download(archive)
    try:
        with tarfile.open(archive) as tar:
            for name in names:
                _unpack(tar, name, datadir / FOLDER / name)
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise UsageError(
            f"cannot unpack {archive}: {error}; if it is damaged, delete it to download it again"
        ) from error
    return datadir / FOLDER


def _unpack(tar: tarfile.TarFile, name: str, path: Path) -> None:
    """Extract the batch `name` to `path`. Unlike `extractall`, this ignores all other members and their paths."""
    member: Any = tar.extractfile(f"{FOLDER}/{name}")
    if member is None:
        raise KeyError(f"{FOLDER}/{name} is not a file")
    with atomic_path(path) as temporary:
        temporary.write_bytes(member.read())


def _download(archive: Path) -> None:
    folder = archive.parent.absolute()
    show(f"cifar10: downloading {CIFAR10.url} into {folder} ...")
    try:
        with downloading_into(folder), atomic_path(archive) as temporary:
            download_url(CIFAR10.url, str(archive.parent), temporary.name, CIFAR10.tgz_md5)
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise UsageError(
            f"cannot find cifar10: neither {FOLDER}/ nor {ARCHIVE} is in {folder}, and the download failed "
            f"({error}). Download {CIFAR10.url} yourself, and put it into that directory"
        ) from error
