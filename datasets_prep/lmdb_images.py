"""Images in LMDBs: NVAE's layout (CelebA-HQ, FFHQ) and LSUN's, as torchvision reads it.

NVAE (Vahdat & Kautz 2020): `train.lmdb` and `validation.lmdb` with the keys "0", "1", ... The values are the raw bytes of
square RGB images, or encoded images.

LSUN: LMDBs such as `church_outdoor_train_lmdb`, with encoded images under hashes. The keys are listed once and stored.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datasets_prep.folder_layout.entries import examples
from datasets_prep.image_dataset import DatasetFacts, ImageDataset, Split
from datasets_prep.images import BadImageError, crop_array, decode_image, image_extent
from datasets_prep.lmdb_file import LmdbFile, image_keys, key_at, list_keys, open_lmdb_file
from options import UsageError

__all__ = ["HELD_OUT_SHARE", "LmdbImages", "open_lmdb", "open_lsun"]

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
        others = sorted(file.parent.name for file in datadir.glob("*/data.mdb"))
        known = (
            f" {datadir} holds the LMDBs {examples(others)}: rename them, or name one of them as --datadir."
            if others
            else ""
        )
        raise UsageError(
            f"{name}: expected {path} (NVAE's layout).{known} Build it from a folder of images with: "
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


class LmdbImages:
    """Reads the images of an LMDB by index. Each value is an encoded image or the raw RGB bytes of a square image.

    All raw images have one size, which is found from the first, the middle and the last value.

    Args:
        file: the LMDB.
        keys: the images' keys.
    """

    def __init__(self, file: LmdbFile, keys: range | np.ndarray | Sequence[bytes]) -> None:
        self._file = file
        self._keys = keys
        self._side = _raw_side([self._value(index) for index in (0, len(keys) // 2, len(keys) - 1)])

    def read(self, index: int, size: int | None) -> torch.Tensor:
        """Read an image as uint8 [3, size, size], cropped as by `read_image`; with `size` None, as uint8 [3, H, W].

        Raises:
            BadImageError: the value is neither an image nor raw bytes of the expected number.
        """
        value, name = self._value(index), self._name(index)
        if self._side is None:
            return decode_image(value, size, name)
        shape = (self._side, self._side, 3)
        if value.startswith(SIGNATURES):
            try:
                return decode_image(value, size, name)
            except BadImageError:  # raw pixels may begin like an encoded image
                if len(value) != math.prod(shape):
                    raise
        if len(value) != math.prod(shape):
            raise BadImageError(name, f"expected {math.prod(shape)} bytes for {shape}, but found {len(value)}")
        return crop_array(np.frombuffer(value, np.uint8).reshape(shape), size)

    def extent(self, index: int) -> tuple[int, int]:
        """The height and width of an image, usually without decoding it.

        Raises:
            BadImageError: the value is not an image.
        """
        value = self._value(index)
        if self._side is not None and len(value) == 3 * self._side**2:
            return self._side, self._side
        return image_extent(io.BytesIO(value), self._name(index))

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
    """The side of the raw images among `values`; None if all are encoded, or do not have the lengths of raw images."""
    plain = [value for value in values if not value.startswith(SIGNATURES)]
    side = math.isqrt(len(plain[0]) // 3) if plain else 0
    return side if side and all(len(value) == 3 * side * side for value in plain) else None


def _as_dataset(name: str, split: Split, image_size: int, file: LmdbFile, keys: range | np.ndarray) -> ImageDataset:
    facts = DatasetFacts(name, image_size, 3, None, True, ())
    labels = np.zeros(len(keys), dtype=np.int64)
    images = LmdbImages(file, keys)
    return ImageDataset(facts, split, labels, lambda index: images.read(index, image_size), file.fingerprint(keys))
