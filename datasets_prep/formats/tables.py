"""Hugging Face datasets in Parquet files (`train-00000-of-00002.parquet`) or in Arrow files, as `save_to_disk` writes them.

An image is a struct {bytes, path} or bytes, in a column named as in IMAGE_COLUMNS. A class id or name is in a column of
LABEL_COLUMNS. The names of classes come from the files' metadata. Arrow files are memory-mapped. Parquet
files are read by row group, and the last few row groups stay in memory.

pyarrow reads the files: pip install pyarrow.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch

from datasets_prep.folder_layout.label_files import label_value
from datasets_prep.formats.content import Content, as_dataset
from datasets_prep.formats.shards import Shards, find_shards, fingerprint_of
from datasets_prep.image_dataset import ImageDataset, Split
from datasets_prep.images import BadImageError, decode_image
from options import UsageError
from runtime.files import UNREADABLE

__all__ = ["find_tables", "open_tables"]

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
KEPT_GROUPS = 8
LARGE_GROUP = 1 << 30  # bytes


class _Columns(NamedTuple):
    """The image column, and the label column or None."""

    image: str
    label: str | None


class _Table(NamedTuple):
    """One file: its schema, the first rows of its groups and the number of rows, and a reader of a group's columns."""

    path: Path
    schema: Any
    starts: np.ndarray
    read: Callable[[int, list[str]], Any]
    largest: int


def find_tables(datadir: Path) -> Shards | None:
    """The Parquet or Arrow files in `datadir`, in its folder `data`, or in folders of the splits; None if there are none."""
    return find_shards(datadir, (".parquet",)) or find_shards(datadir, (".arrow",))


def open_tables(name: str, shards: Shards, split: Split, image_size: int) -> ImageDataset:
    """Open a split.

    Raises:
        UsageError: pyarrow is missing, or a file is damaged or lacks a column of images.
    """
    train = _read_content(shards.train, shards.root)
    own = train if shards.of_split(split) is shards.train else _read_content(shards.held_out, shards.root)
    return as_dataset(name, shards, split, image_size, train, own)


def _read_content(paths: list[Path], root: Path) -> Content:
    tables = [_open_table(path) for path in paths]
    columns = _choose_columns(tables)
    labels: list[int | str | None] = []
    for table in tables:
        labels += [] if columns.label is None else _labels_of(table, columns.label)
    count = sum(int(table.starts[-1]) for table in tables)
    large = [table.path for table in tables if table.largest > LARGE_GROUP]
    return Content(
        labels=labels or [None] * count,
        fingerprint=fingerprint_of(paths, root),
        source=f"from the column {columns.label}" if columns.label else f"in a column {' or '.join(LABEL_COLUMNS[:2])}",
        image=_reader_of(tables, columns.image),
        class_names=_class_names(tables[0].schema, columns.label),
        warnings=(f"{large[0]} has row groups above 1 GB, which are read as a whole: write it with row_group_size=100",)
        if large
        else (),
    )


def _reader_of(tables: list[_Table], column: str) -> Callable[[int, int], torch.Tensor]:
    first_rows = np.cumsum([0, *(table.starts[-1] for table in tables)])
    lock = Lock()

    @lru_cache(KEPT_GROUPS)
    def group(file: int, number: int) -> Any:
        return tables[file].read(number, [column]).column(0)

    def read(row: int, size: int) -> torch.Tensor:
        file = int(np.searchsorted(first_rows, row, side="right")) - 1
        within = row - int(first_rows[file])
        number = int(np.searchsorted(tables[file].starts, within, side="right")) - 1
        with lock, _as_damaged(tables[file].path):  # locked, so that threads do not read one group several times
            value = group(file, number)[within - int(tables[file].starts[number])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        name = f"row {within} of {tables[file].path}"
        if not isinstance(data, bytes):
            raise BadImageError(
                name, f"expected the bytes of an image in the column {column}, but found {_describe(value)}"
            )
        return decode_image(data, size, name)

    return read


@contextmanager
def _as_damaged(path: Path) -> Iterator[None]:
    """Report errors of pyarrow as a damaged file. Most of them are subclasses of Python's errors."""
    try:
        yield
    except UNREADABLE as error:
        text = str(error).strip().partition("\n")[0]
        raise UsageError(f"cannot read {path}: {text}; download or write it again") from error


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"a path without bytes ({value['path']})" if value.get("path") else "neither bytes nor a path"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _labels_of(table: _Table, column: str) -> list[int | str | None]:
    groups = range(len(table.starts) - 1)
    with _as_damaged(table.path):
        values = [value for number in groups for value in table.read(number, [column]).column(0).to_pylist()]
    if len(values) != table.starts[-1]:
        raise UsageError(f"{table.path} is damaged: expected {table.starts[-1]:,} labels, but found {len(values):,}")
    try:
        return [label_value(value) for value in values]
    except ValueError as error:
        raise UsageError(
            f"{table.path}: expected class ids or names in the column {column}, but found others"
        ) from error


def _choose_columns(tables: Sequence[_Table]) -> _Columns:
    names = tables[0].schema.names
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise UsageError(
            f"{tables[0].path}: expected a column of images named {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]}, but "
            f"found {', '.join(names) or 'no columns'}; rename the column"
        )
    columns = _Columns(image, next((name for name in LABEL_COLUMNS if name in names), None))
    for table in tables:
        if missing := {column for column in columns if column is not None} - set(table.schema.names):
            raise UsageError(f"{table.path} lacks the column {missing.pop()}, which {tables[0].path} has")
    return columns


def _class_names(schema: Any, column: str | None) -> tuple[str, ...]:
    """The names of the classes that Hugging Face's metadata give; empty without them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _open_table(path: Path) -> _Table:
    """Open a Parquet file, or memory-map an Arrow file.

    Raises:
        UsageError: pyarrow is missing, or the file is damaged.
    """
    try:
        import pyarrow as arrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise UsageError(f"{path.name} needs the package pyarrow: pip install pyarrow") from error
    with _as_damaged(path):
        if path.suffix.lower() == ".parquet":
            file = parquet.ParquetFile(path)
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            starts = np.cumsum([0, *(group.num_rows for group in groups)])
            largest = max((group.total_byte_size for group in groups), default=0)
            lock = Lock()

            def read_group(number: int, columns: list[str]) -> Any:
                with lock:  # a ParquetFile has one position
                    return file.read_row_group(number, columns=columns).combine_chunks()

            return _Table(path, file.schema_arrow, starts, read_group, largest)
        table = ipc.open_stream(arrow.memory_map(str(path))).read_all()
    batches = table.to_batches()
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    return _Table(path, table.schema, starts, lambda number, columns: batches[number].select(columns), 0)
