"""Images in LMDBs: NVAE's layout (CelebA-HQ, FFHQ) and LSUN's, as torchvision reads it.

NVAE (Vahdat & Kautz 2020): `train.lmdb` and `validation.lmdb` with the keys "0", "1", ... The values are the raw bytes of
square RGB images, or encoded images.

LSUN: LMDBs such as `church_outdoor_train_lmdb`, with encoded images under hashes. The keys are listed once and stored.
"""

import math
from pathlib import Path

import numpy as np
import torch

from datasets_prep.image_dataset import DatasetFacts, ImageDataset, Split
from datasets_prep.images import BadImageError, crop_array, decode_image
from datasets_prep.lmdb_file import LmdbFile, image_keys, key_at, list_keys, open_lmdb_file
from options import UsageError

__all__ = ["HELD_OUT_SHARE", "open_lmdb", "open_lsun"]

HELD_OUT_SHARE = 10  # the last tenth of an LMDB with both splits is held out: 3,000 images of CelebA-HQ, 7,000 of FFHQ
LSUN_NAMES = {"lsun_church": "church_outdoor", "lsun_bedroom": "bedroom"}
LSUN_SPLITS = {"train": "train", "validation": "val"}
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")  # of PNG, JPEG and WebP


def open_lmdb(name: str, datadir: Path, split: Split, image_size: int) -> ImageDataset:
    """Open `train.lmdb` or `validation.lmdb` below `datadir`. If `datadir` is an LMDB itself, its last tenth is held out.

    Raises:
        UsageError: the LMDB is missing, empty or damaged.
    """
    path = datadir / f"{split}.lmdb"
    alone = not path.exists() and (datadir / "data.mdb").is_file()
    if not path.exists() and not alone:
        raise UsageError(
            f"{name}: expected {path} (NVAE's layout). Build it from a folder of images with: "
            f"python -m datasets_prep.build_lmdb --source FOLDER --datadir {datadir} --image_size {image_size}"
        )
    file = open_lmdb_file(datadir if alone else path)
    keys: range | np.ndarray = range(len(file))
    if file.get(b"0") is None:
        keys = list_keys(file, datadir / f"{file.path.name}_keys.npy")
        keys = keys[image_keys(keys, image_size, str(file.path))]
    if not len(keys):
        raise UsageError(f"the LMDB {file.path} is empty")
    if alone:
        held_out = len(keys) // HELD_OUT_SHARE
        keys = keys[len(keys) - held_out :] if split == "validation" else keys[: len(keys) - held_out]
        if not len(keys):
            raise UsageError(f"the LMDB {file.path} has too few images to hold out a tenth of them")
    return _as_dataset(name, split, image_size, file, keys)


def open_lsun(name: str, datadir: Path, split: Split, image_size: int) -> ImageDataset:
    """Open `<category>_train_lmdb` or `<category>_val_lmdb` below `datadir`.

    Raises:
        UsageError: the LMDB is missing, empty or damaged.
    """
    path = datadir / f"{LSUN_NAMES[name]}_{LSUN_SPLITS[split]}_lmdb"
    if not path.exists():
        raise UsageError(
            f"{name}: expected the LMDB {path}: unpack LSUN's {path.name}.zip there (see docs/datasets.md)"
        )
    file = open_lmdb_file(path)
    return _as_dataset(name, split, image_size, file, list_keys(file, datadir / f"{path.name}_keys.npy"))


class _Reader:
    """Reads images by index. The values are either all raw RGB of one size or all encoded images."""

    def __init__(self, file: LmdbFile, keys: range | np.ndarray, image_size: int) -> None:
        self._file = file
        self._keys = keys
        self._image_size = image_size
        self._side = _raw_side([self._value(index) for index in (0, len(keys) // 2, len(keys) - 1)])

    def __call__(self, index: int) -> torch.Tensor:
        value, name = self._value(index), self._name(index)
        if self._side is None:
            return decode_image(value, self._image_size, name)
        shape = (self._side, self._side, 3)
        if len(value) != math.prod(shape):
            raise BadImageError(name, f"expected {math.prod(shape)} bytes for {shape}, but found {len(value)}")
        return crop_array(np.frombuffer(value, np.uint8).reshape(shape), self._image_size)

    def _name(self, index: int) -> str:
        return f"{key_at(self._keys, index).decode(errors='replace')!r} of {self._file.path}"

    def _value(self, index: int) -> bytes:
        value = self._file.get(key_at(self._keys, index))
        if value is None:
            raise UsageError(
                f"there is no image {self._name(index)}, which has {len(self._file)} entries: expected the keys "
                "'0', '1', ... without gaps; rebuild the LMDB with python -m datasets_prep.build_lmdb"
            )
        return value


def _raw_side(values: list[bytes]) -> int | None:
    """The side of the images if the values are raw bytes of square RGB images; None if they are encoded images."""
    side = math.isqrt(len(values[0]) // 3)
    raw = all(len(value) == 3 * side * side for value in values)
    encoded = all(value.startswith(SIGNATURES) for value in values)
    return side if raw and side and not encoded else None


def _as_dataset(name: str, split: Split, image_size: int, file: LmdbFile, keys: range | np.ndarray) -> ImageDataset:
    facts = DatasetFacts(name, image_size, 3, None, True, ())
    labels = np.zeros(len(keys), dtype=np.int64)
    return ImageDataset(facts, split, labels, _Reader(file, keys, image_size), file.fingerprint(keys))
