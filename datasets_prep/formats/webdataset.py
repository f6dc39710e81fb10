"""WebDataset's tar files: consecutive members with one base name, such as `00042.jpg` and `00042.cls`, are a sample.

Each file is scanned once for the offsets of its images and for its labels; an index next to the files keeps both. Images are
then read by number, so that every order is possible, and a run resumes at any step.

The base name ends at the first dot of the file name. The image is the first member that ends in one of SUFFIXES. The label is
a class id or name in a member that ends in `cls`, or an entry of LABEL_ENTRIES in one that ends in `json`.
"""

import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from datasets_prep.folder_layout.label_files import label_value
from datasets_prep.formats.content import Content, as_dataset
from datasets_prep.formats.shards import FileBytes, Files, Shards, find_shards, fingerprint_of
from datasets_prep.image_dataset import ImageDataset, Split
from datasets_prep.images import BadImageError, decode_image
from options import UsageError
from runtime.files import UNREADABLE, atomic_path
from runtime.messages import note
from runtime.progress import progress_bar

__all__ = ["find_tars", "open_tars", "read_tars"]

SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp"))
CLASS, DETAILS = "cls", "json"
LABEL_ENTRIES = ("label", "cls", "class", "class_id", "labels")
INDEX = "webdataset_index.npz"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
OFFICIAL = "ILSVRC2012"  # ImageNet's archives, which datasets_prep.unpack_imagenet reads
BLOCK = 512  # bytes of a tar file's header, and of the padding
NAME_BYTES = 100  # of a header
SCANNERS = 8  # threads
SEPARATOR = "\n"


class _Index(NamedTuple):
    """The images of some tar files: file number, offset and size in bytes int64 [N], labels, and the members left out."""

    files: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: list[int | str | None]
    without_image: int


def find_tars(datadir: Path) -> Shards | None:
    """The tar files in `datadir`, sorted into splits by name (`train-0000.tar`, `val-0000.tar`) or folder; None without any."""
    return find_shards(datadir, (".tar", *COMPRESSED), lambda path: not path.name.startswith(OFFICIAL))


def open_tars(name: str, shards: Shards, split: Split, image_size: int) -> ImageDataset:
    """Open a split.

    Raises:
        UsageError: a tar file is compressed, truncated or damaged, or holds no images.
    """

    def read(paths: list[Path]) -> Content:
        fingerprint = fingerprint_of(paths, shards.root)
        return read_tars(FileBytes(paths), fingerprint, paths[0].parent)

    train = read(shards.train)
    own = train if shards.of_split(split) is shards.train else read(shards.held_out)
    return as_dataset(name, shards, split, image_size, train, own)


def read_tars(files: Files, fingerprint: str, folder: Path) -> Content:
    """The contents of tar files. Their index is in `folder`, under a name from `fingerprint`.

    Raises:
        UsageError: see `open_tars`.
    """
    for name in files.names:
        if name.lower().endswith(COMPRESSED):
            raise UsageError(
                f"{name} is compressed, so its images cannot be read in any order: unpack it to a .tar file"
            )
    cache = folder / f"{fingerprint[:8]}_{INDEX}"
    index = _load(cache, len(files.names))
    if index is None:
        index = _scan(files)
        _save(cache, index)
    if not len(index.files):
        raise UsageError(
            f"{files.names[0]} holds no images: expected members ending in {', '.join(sorted(SUFFIXES))}, each with a member "
            f"of the same name ending in {CLASS} or {DETAILS}"
        )

    def read(row: int, size: int) -> torch.Tensor:
        number, offset, length = (int(column[row]) for column in index[:3])
        data = files.read(number, offset, length)
        try:
            return decode_image(data, size, "")
        except BadImageError as error:
            member = files.read(number, offset - BLOCK, NAME_BYTES).split(b"\0")[0].decode(errors="replace")
            raise BadImageError(f"{member} of {files.names[number]}", error.reason) from error

    left_out = (f"samples without an image: {index.without_image:,}",) if index.without_image else ()
    return Content(index.labels, fingerprint, f"from .{CLASS} or .{DETAILS} files", image=read, left_out=left_out)


def _scan(files: Files) -> _Index:
    count = len(files.names)
    with ThreadPoolExecutor(SCANNERS) as scanners:
        scanned = scanners.map(lambda number: _scan_file(files, number), range(count))
        found = list(progress_bar(scanned, total=count, desc="scanning tar files", unit="file", leave=False))
    rows = [(number, *row) for number, (own, _) in enumerate(found) for row in own]
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    arrays = [np.array(column, np.int64) for column in columns[:3]]
    return _Index(arrays[0], arrays[1], arrays[2], list(columns[3]), sum(without for _, without in found))


def _scan_file(files: Files, number: int) -> tuple[list[tuple[int, int, int | str | None]], int]:
    """The offset, size and label of each image in a tar file, and the number of samples without an image."""
    rows, without, name = list[tuple[int, int, int | str | None]](), 0, files.names[number]
    try:
        with files.open(number) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for members in _samples(archive):
                image = next((m for kind, m in members if kind.rpartition(".")[2] in SUFFIXES), None)
                if image is None:
                    without += 1
                else:
                    rows.append((image.offset_data, image.size, _read_label(archive, members, name)))
            file.seek(archive.offset)
            whole = file.read(BLOCK) == bytes(BLOCK)  # a complete file ends in empty blocks
    except UsageError:
        raise
    except (tarfile.TarError, *UNREADABLE) as error:
        raise UsageError(f"{name} is truncated or not a tar file ({error}): download or pack it again") from error
    if not whole:
        raise UsageError(f"{name} is truncated: it ends without tar's end mark; download or pack it again")
    return rows, without


def _samples(archive: tarfile.TarFile) -> Iterator[list[tuple[str, tarfile.TarInfo]]]:
    """Yield the members of each sample, with the part of the name after the first dot in lower case."""
    key, members = None, list[tuple[str, tarfile.TarInfo]]()
    for member in archive:
        archive.members = []  # type: ignore[attr-defined] # tarfile keeps all members
        name = PurePosixPath(member.name)
        base, _, kind = name.name.partition(".")
        if not member.isreg() or not base or not kind or name.name.startswith("._"):
            continue
        if (name.parent, base) != key:
            if members:
                yield members
            key, members = (name.parent, base), []
        members.append((kind.lower(), member))
    if members:
        yield members


def _read_label(archive: tarfile.TarFile, members: list[tuple[str, tarfile.TarInfo]], name: str) -> int | str | None:
    by_kind = {kind.rpartition(".")[2]: member for kind, member in members}
    member = by_kind.get(CLASS) or by_kind.get(DETAILS)
    content = None if member is None else archive.extractfile(member)
    if member is None or content is None:
        return None
    data = content.read()
    try:
        if CLASS in by_kind:
            return label_value(data.decode().strip())
        details: Any = json.loads(data)
        entry = next((key for key in LABEL_ENTRIES if key in details), None) if isinstance(details, dict) else None
        return None if entry is None else label_value(details[entry])
    except ValueError as error:
        raise UsageError(f"{member.name} of {name}: expected a class id or name, but found {data[:40]!r}") from error


def _load(cache: Path, files: int) -> _Index | None:
    """The index in a file; None if it is missing or damaged."""
    try:
        with np.load(cache, allow_pickle=False) as stored:
            numbers, offsets, sizes = (stored[name] for name in ("files", "offsets", "sizes"))
            texts = str(stored["labels"]).split(SEPARATOR) if len(numbers) else []
            index = _Index(numbers, offsets, sizes, [json.loads(text) for text in texts], int(stored["without_image"]))
    except UNREADABLE:
        return None
    whole = len(numbers) == len(offsets) == len(sizes) == len(texts) and (not len(numbers) or numbers.max() < files)
    return index if whole else None


def _save(cache: Path, index: _Index) -> None:
    labels = np.array(SEPARATOR.join(map(json.dumps, index.labels)))
    try:
        with atomic_path(cache) as temporary, temporary.open("wb") as file:
            np.savez(
                file, files=index.files, offsets=index.offsets, sizes=index.sizes, labels=labels,
                without_image=index.without_image,
            )  # fmt: skip
    except OSError as error:  # the folder may be read-only
        note(f"cannot save the index of the tar files, so they are scanned again next time: {error}")
