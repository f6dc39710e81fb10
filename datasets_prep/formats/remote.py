"""WebDataset's tar files in object stores and on web servers: `--datadir s3://bucket/folder`, `hf://...`, `https://...`.

Each image is one request for a range of bytes, so images are read by number as from a local disk: the order of the images, its
independence of the number of processes, and the exact resume are the sampler's. The index of `webdataset` is built by reading
all files once, and is kept in the folder for derived files. With the latent cache, images are read a second time to encode
them, and never again.

fsspec reads the files, and needs a package for each kind of store: s3fs, gcsfs, or aiohttp for web servers.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from datasets_prep.folder_layout.splits import split_names
from datasets_prep.formats.content import Content, as_dataset
from datasets_prep.formats.shards import Shards
from datasets_prep.formats.webdataset import read_tars
from datasets_prep.image_dataset import ImageDataset, Split
from options import UsageError

__all__ = ["is_url", "open_remote"]

MARK = "://"
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "abfs": "adlfs"}
# Entries of a listing that change with a file, the best first. The size does not: tar files are padded to blocks.
VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "Last-Modified", "last_modified", "mtime")
LISTERS = 8  # threads


def is_url(datadir: str) -> bool:
    """Whether `datadir` names files that are not on a local disk."""
    return MARK in datadir


def open_remote(name: str, url: str, split: Split, image_size: int, folder: Path) -> ImageDataset:
    """Open a split of the tar files at `url`: one file, a folder, or a pattern with asterisks.

    Args:
        name: of the dataset.
        url: such as s3://bucket/folder.
        split: sorted by file names, as for local files; otherwise, every twentieth image is held out.
        image_size: side of the images in pixels.
        folder: keeps the index.

    Raises:
        UsageError: a package is missing, the place holds no tar file, or a tar file is damaged.
    """
    system, root = _connect(url)
    found = _list_tars(system, root, url)
    above = str(PurePosixPath(root).parent if "*" in root or root.endswith(".tar") else PurePosixPath(root))
    by_name = {path.removeprefix(above): path for path in found}
    train, held_out = ([by_name[name] for name in names] for names in split_names(by_name))
    unused = [Path(path) for path in found if path not in (*train, *held_out)]
    shards = Shards(Path(above), list(map(Path, train)), list(map(Path, held_out)), unused)

    def read(paths: list[str]) -> Content:
        versions = {path: found[path] for path in paths}
        fingerprint = hashlib.sha256(repr(sorted(versions.items())).encode()).hexdigest()
        return read_tars(_RemoteFiles(system, paths), fingerprint, folder)

    training = read(train)
    own = read(held_out) if split == "validation" and held_out else training
    return as_dataset(name, shards, split, image_size, training, own)


class _RemoteFiles:
    def __init__(self, system: Any, names: list[str]) -> None:
        self.names = names
        self._system = system

    def open(self, number: int) -> BinaryIO:
        return self._system.open(self.names[number], "rb")

    def read(self, number: int, offset: int, size: int) -> bytes:
        name = self.names[number]
        try:
            data = self._system.cat_file(name, start=offset, end=offset + size)
        except Exception as error:  # each store has its own errors
            raise UsageError(f"cannot read {name}: {error}; check the connection, and resume") from error
        if len(data) < size:
            raise UsageError(
                f"{name} is truncated: expected {size:,} bytes at byte {offset:,}, but found {len(data):,}"
            )
        return data


def _connect(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there.

    Raises:
        UsageError: a package is missing, or the kind of store is unknown.
    """
    kind = url.split(MARK)[0].rpartition("::")[2]
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(kind, "fsspec")
        raise UsageError(f"--datadir {url} needs the package {package}: pip install {package}") from error
    except Exception as error:
        raise UsageError(f"--datadir {url}: {error}; expected a URL such as s3://bucket/folder") from error


def _list_tars(system: Any, root: str, url: str) -> dict[str, str]:
    """The sizes and versions of the tar files by path.

    Raises:
        UsageError: there are none.
    """
    patterns = (
        [root] if PurePosixPath(root).suffix == ".tar" else [f"{root.rstrip('/')}/*.tar", f"{root.rstrip('/')}/*/*.tar"]
    )
    try:
        for pattern in patterns:
            details = system.glob(pattern, detail=True)
            if details:
                with ThreadPoolExecutor(LISTERS) as listers:
                    versions = listers.map(partial(_version_of, system), sorted(details.items()))
                    return dict(zip(sorted(details), versions, strict=True))
    except Exception as error:  # each store has its own errors
        raise UsageError(f"cannot list {url}: {error}; check the URL, the connection and your rights") from error
    raise UsageError(
        f"no tar files at {url}: expected a folder with WebDataset's .tar files, one of them, or a pattern such as *.tar"
    )


def _version_of(system: Any, listed: tuple[str, dict[str, Any]]) -> str:
    """The size of a listed file with the store's version of it, which changes when the file is replaced."""
    path, entry = listed
    if not any(entry.get(key) for key in VERSIONS):
        entry = system.info(path)  # web servers list names alone
    version = next((entry[key] for key in VERSIONS if entry.get(key)), None)
    return f"{entry['size']} {version or system.checksum(path)}"
