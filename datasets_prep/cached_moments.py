"""The files of a latent cache: its shards, labels and checks, and random access to the shards at disk speed.

By default, the system reads far ahead in memory-mapped files. In random order, it may then read megabytes for a single row
of 16 kB. MADV_RANDOM turns read-ahead off. MADV_WILLNEED announces all rows of a batch before the first is used, so that the
disk reads them concurrently.
"""

import errno
import mmap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.autoencoders.statistics import LatentStatistics
from options import UsageError
from runtime.files import UNREADABLE, atomic_path, read_json, write_json
from runtime.messages import note
from runtime.progress import progress_bar

__all__ = [
    "LatentCache",
    "as_bad_manifest",
    "check_files",
    "checksum",
    "finish_cache",
    "has_mirror_images",
    "is_finished",
    "read_labels",
    "save_shard",
    "shard_path",
    "update_labels",
]

LABELS = "labels.npy"
# The manifest's file name, and its entry {mean, std} with one number per channel.
MANIFEST, STATISTICS = "manifest.json", "latent_statistics"
ADVISABLE = hasattr(mmap, "MADV_WILLNEED")  # not on Windows


class LatentCache:
    """Posterior moments of a split's images by index. The images themselves are not needed."""

    def __init__(self, folder: Path, manifest: dict[str, Any], labels: torch.Tensor) -> None:
        self.folder = folder
        self.labels = labels
        self.precision: str = manifest.get("precision", "fp32")  # the encoder's; older caches do not record it
        self.orientations: int = manifest["orientations"]
        self.shard_size: int = manifest["shard_size"]
        self.shards = [_map_rows(folder / entry["file"]) for entry in manifest["shards"]]
        self.moment_shape: tuple[int, ...] = tuple(manifest["moment_shape"])
        rows = [min(self.shard_size, len(labels) - first) for first in range(0, len(labels), self.shard_size)]
        expected = [(count, self.orientations, *self.moment_shape) for count in rows]
        if [shard.shape for shard in self.shards] != expected:
            raise ValueError("the shards have unexpected shapes")

    def __len__(self) -> int:
        return len(self.labels)

    def statistics(self) -> LatentStatistics | None:
        """The latents' statistics in the manifest; None if they have not been measured."""
        stored = read_json(self.folder / MANIFEST).get(STATISTICS)
        return LatentStatistics(tuple(stored["mean"]), tuple(stored["std"])) if stored else None

    def keep_statistics(self, statistics: LatentStatistics) -> None:
        """Add the latents' statistics to the manifest; a note says if that fails."""
        path = self.folder / MANIFEST
        try:
            write_json(path, {**read_json(path), STATISTICS: statistics._asdict()})
        except OSError as error:  # the cache may be on a read-only disk
            note(f"the latent cache {self.folder} cannot keep the latents' statistics: {error}")

    def moments(self, indices: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """Read the float16 moments [B, 2 c, h, w] of images `indices` [B], or of their mirror images where `mirrored` [B].

        A cache without mirror images ignores `mirrored`.
        """
        moments = np.empty((len(indices), *self.moment_shape), np.float16)
        shard_of, row_of = np.divmod(indices.numpy(), self.shard_size)
        orientation_of = mirrored.numpy().astype(int) % self.orientations
        locations = list(zip(shard_of.tolist(), row_of.tolist(), orientation_of.tolist(), strict=True))
        for shard, row, orientation in locations:
            _prefetch(self.shards[shard], row * self.orientations + orientation, moments[:1].nbytes)
        for i, (shard, row, orientation) in enumerate(locations):
            moments[i] = self.shards[shard][row, orientation]
        return torch.from_numpy(moments)


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard. Next to it, `save_shard` writes an entry with the suffix .json."""
    return folder / f"moments_{number:05d}.npy"


def save_shard(path: Path, moments: np.ndarray, precision: str) -> None:
    """Write a shard float16 [n, orientations, C, h, w], then its entry, whose existence shows that the shard is complete."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, moments)
    write_json(path.with_suffix(".json"), {"file": path.name, "crc32": checksum(path), "precision": precision})


def finish_cache(folder: Path, identity: dict[str, Any], shards: int, labels: np.ndarray) -> None:
    """Write the labels int64 [N] and the complete manifest of a cache whose shards are complete."""
    entries = [read_json(shard_path(folder, number).with_suffix(".json")) for number in range(shards)]
    listed = [{"file": entry["file"], "crc32": entry["crc32"]} for entry in entries]
    with atomic_path(folder / LABELS) as temporary, temporary.open("wb") as file:
        np.save(file, labels)
    found = {
        # Shards of older versions do not record their precision.
        "precision": " and ".join(sorted({entry.get("precision", "fp32") for entry in entries})),
        "labels": {"file": LABELS, "crc32": checksum(folder / LABELS)},
        "shards": listed,
    }
    write_json(folder / "manifest.json", identity | found)


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a complete cache.

    Raises:
        UsageError: its manifest is damaged.
    """
    path = folder / "manifest.json"
    return path.exists() and "shards" in read_json(path)


def has_mirror_images(folder: Path) -> bool | None:
    """Whether a complete or partial cache stores mirror images; None without a cache.

    Raises:
        UsageError: its manifest is damaged.
    """
    path = folder / "manifest.json"
    return read_json(path).get("orientations") == 2 if path.exists() else None


@contextmanager
def as_bad_manifest(folder: Path) -> Iterator[None]:
    """Report other errors as a damaged manifest, the only file without a checksum."""
    try:
        yield
    except UsageError:
        raise
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
            raise UsageError(
                f"cannot read the latent cache {folder} ({error}): check the disk or its connection, or name a folder on "
                "another one with --latent_cache_dir"
            ) from error
        raise UsageError(
            f"the latent cache {folder} does not match its manifest.json ({error}): delete the folder to rebuild it"
        ) from error


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Check that a cache is finished, and compare the checksums of its files with the manifest's.

    Raises:
        UsageError: it is unfinished, or a file is missing or damaged.
    """
    if "shards" not in manifest:
        raise UsageError(f"the latent cache {folder} is unfinished: restart training to complete it")
    files = [manifest["labels"], *manifest["shards"]]
    for entry in progress_bar(files, desc="checking the latent cache", unit="file", leave=False):
        if checksum(folder / entry["file"]) != entry["crc32"]:
            raise UsageError(
                f"the file {folder / entry['file']} is damaged (its checksum differs from the manifest's): "
                f"delete the folder {folder} to rebuild it"
            )


def checksum(path: Path) -> int:
    """The CRC-32 of a file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return zlib.crc32(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read the latent cache file {path}: {error}") from error


def read_labels(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    """The labels int64 [N] stored in a cache."""
    return np.load(folder / manifest["labels"]["file"], allow_pickle=False)


def update_labels(folder: Path, labels: np.ndarray) -> None:
    """Replace the labels of a finished cache if they differ from `labels`, int64 [N].

    Labels may change without the images, for example with a metadata.csv. Training reads the dataset's labels, but a cache
    can also be used without its images.
    """
    manifest = read_json(folder / "manifest.json")
    try:
        if np.array_equal(read_labels(folder, manifest), labels):
            return
    except UNREADABLE:  # opening the cache reports the damage
        return
    old = manifest["labels"]["file"]
    try:
        path = folder / f"labels_{zlib.crc32(labels.tobytes()):08x}.npy"
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, labels)
        entry = {"file": path.name, "crc32": checksum(path)}
        write_json(folder / "manifest.json", {**manifest, "labels": entry})
        (folder / old).unlink()
    except OSError as error:  # the cache may be on a read-only disk
        note(f"the latent cache {folder} keeps older labels, because it cannot be written: {error}")


def _map_rows(path: Path) -> np.memmap:
    """Memory-map the array in a file for random access."""
    try:
        array: np.memmap = np.load(path, mmap_mode="r")
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        # Network and FUSE file systems without shared maps have private ones.
        array = np.load(path, mmap_mode="c")
    if ADVISABLE:
        with suppress(OSError):
            array.base.madvise(mmap.MADV_RANDOM)  # type: ignore[union-attr]
    return array


def _prefetch(array: np.memmap, number: int, size: int) -> None:
    """Ask the system to read block `number` of `size` bytes of the array, without waiting for it."""
    if ADVISABLE:
        first = array.offset + number * size
        start = first - first % mmap.PAGESIZE
        with suppress(OSError):
            array.base.madvise(mmap.MADV_WILLNEED, start, first + size - start)  # type: ignore[union-attr]
