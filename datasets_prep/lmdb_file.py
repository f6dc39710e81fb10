"""Read access to an LMDB from any number of threads and processes.

A process must not open an environment twice, and must not use one inherited through a fork. So each process has one handle
per file, which reopens its environment in a forked child. Files are not locked: they are complete, and may be on a read-only
disk.
"""

import errno
import hashlib
import os
import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import lmdb
import numpy as np

from options import UsageError
from runtime.files import UNREADABLE, atomic_path
from runtime.messages import note
from runtime.progress import progress_bar

__all__ = ["METADATA_KEYS", "LmdbFile", "image_keys", "list_keys", "open_lmdb_file"]

METADATA_KEYS = frozenset((b"length", b"__len__", b"__keys__"))  # some writers store these next to the images
SIZED_KEY = re.compile(rb"(\d+)-\d+")  # of an LMDB with every image in several sizes, such as 256-00042

SAMPLED_VALUES = 16  # number of values in the fingerprint
_handles: "weakref.WeakValueDictionary[Path, LmdbFile]" = weakref.WeakValueDictionary()
_opening = threading.Lock()


class LmdbFile:
    """The values of an LMDB by key. Use `open_lmdb_file` to create one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._environment = _open(path)
        self._process = os.getpid()
        self._reopening = threading.Lock()

    def __len__(self) -> int:
        return self._current().stat()["entries"]

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`; None if there is none.

        Raises:
            UsageError: the file is damaged.
        """
        try:
            with self._current().begin() as transaction:
                return transaction.get(key)
        except lmdb.Error as error:
            raise UsageError(f"cannot read the LMDB {self.path}: {error}") from error

    def keys(self) -> Iterator[bytes]:
        """All keys in order.

        Raises:
            UsageError: the file is damaged.
        """
        try:
            with self._current().begin() as transaction, transaction.cursor() as cursor:
                yield from cursor.iternext(keys=True, values=False)
        except lmdb.Error as error:
            raise UsageError(f"cannot read the LMDB {self.path}: {error}") from error

    def ends(self) -> tuple[bytes, bytes]:
        """The first and the last key.

        Raises:
            UsageError: the file is empty.
        """
        with self._current().begin() as transaction, transaction.cursor() as cursor:
            if not cursor.first():
                raise UsageError(f"the LMDB {self.path} is empty")
            first = cursor.key()
            cursor.last()
            return first, cursor.key()

    def fingerprint(self, keys: np.ndarray | range) -> str:
        """SHA-256 over the number of entries, their overflow pages, and the values of SAMPLED_VALUES evenly spaced `keys`.

        A copy of the file has the same fingerprint. The cost does not depend on the file's size.
        """
        stat = self._current().stat()
        digest = hashlib.sha256(f"{stat['entries']} {stat['overflow_pages']}".encode())
        for index in np.linspace(0, len(keys) - 1, SAMPLED_VALUES).astype(int):
            key = key_at(keys, int(index))
            digest.update(key + b" " + (self.get(key) or b""))
        return digest.hexdigest()

    def _current(self) -> lmdb.Environment:
        if self._process != os.getpid():
            with self._reopening:
                if self._process != os.getpid():
                    self._environment.close()
                    self._environment = _open(self.path)
                    self._process = os.getpid()
        return self._environment


def open_lmdb_file(path: Path) -> LmdbFile:
    """Get this process's handle of the LMDB at `path`, a folder with a `data.mdb` or a single file.

    Raises:
        UsageError: the LMDB is missing or damaged.
    """
    path = path.resolve()
    with _opening:
        handle = _handles.get(path)
        if handle is None:
            handle = _handles[path] = LmdbFile(path)
        return handle


def key_at(keys: np.ndarray | range | Sequence[bytes], index: int) -> bytes:
    """The key of image `index`. The numbers in a range become decimal strings."""
    return str(keys[index]).encode() if isinstance(keys, range) else bytes(keys[index])


def list_keys(file: LmdbFile, cache: Path) -> np.ndarray:
    """List all keys of `file` in order, as bytes [N] of fixed width.

    Listing a large file takes minutes, so the keys are stored in `cache`, a .npy file.

    Raises:
        UsageError: a key ends in a zero byte, which a fixed-width array cannot hold.
    """
    known = _read_keys(cache)
    first, last = file.ends()
    if known is not None and len(known) == len(file) and (known[0], known[-1]) == (first, last):
        return known
    found = list(progress_bar(file.keys(), total=len(file), desc=f"listing {file.path.name}", unit="key", leave=False))
    if any(key.endswith(b"\0") for key in found):
        raise UsageError(
            f"the LMDB {file.path} has keys that end in a zero byte, which are not supported: check that it holds images"
        )
    keys = np.array(found)
    try:
        with atomic_path(cache) as temporary, temporary.open("wb") as output:
            np.save(output, keys)
    except OSError as error:  # the data directory may be read-only
        note(f"cannot save the list of keys: {error}")
    return keys


def image_keys(keys: Sequence[bytes] | np.ndarray, side: int | None, name: str) -> list[int]:
    """The positions of images among all keys: without METADATA_KEYS, and each image in one size only.

    LMDBs of StyleGAN2 in PyTorch hold each image in several sizes, under keys such as `256-00042`. Of these, the smallest size
    of at least `side` pixels is chosen, or the largest one.

    Args:
        keys: all keys of an LMDB in order.
        side: the wanted side in pixels; None: the largest.
        name: the LMDB in messages.
    """
    images = [number for number, key in enumerate(keys) if key not in METADATA_KEYS]
    sizes: dict[int, list[int]] = {}
    for number in images:
        match = SIZED_KEY.fullmatch(keys[number])
        if match is None:
            return images
        sizes.setdefault(int(match[1]), []).append(number)
    if len(sizes) < 2:
        return images
    found = sorted(sizes)
    chosen = next((size for size in found if side is not None and size >= side), found[-1])
    note(f"{name} has each image in {len(found)} sizes ({', '.join(map(str, found))}): {chosen} is used")
    return sizes[chosen]


def _read_keys(path: Path) -> np.ndarray | None:
    try:
        keys = np.load(path, allow_pickle=False)
    except UNREADABLE:
        return None
    return keys if keys.dtype.kind == "S" and keys.ndim == 1 and len(keys) else None


def _open(path: Path) -> lmdb.Environment:
    data = path / "data.mdb" if path.is_dir() else path
    if not data.is_file():
        raise UsageError(f"cannot open the LMDB {path}: expected the file {data}, but there is none")
    if not data.stat().st_size:
        raise UsageError(f"cannot open the LMDB {path}: {data} is empty; download or build it again")
    try:
        environment = lmdb.open(
            str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, create=False
        )
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        found = data.stat().st_size
    except (lmdb.Error, OSError) as error:
        advice = ""
        if os.strerror(errno.ENODEV) in str(error):
            advice = "; its file system cannot map files into memory: copy the LMDB to a local disk"
        raise UsageError(f"cannot open the LMDB {path}: {error}{advice}") from error
    if found < needed:  # reading past the end of the file would kill the process
        raise UsageError(f"{data} is truncated: expected {needed} bytes, but found {found}; download or build it again")
    return environment
