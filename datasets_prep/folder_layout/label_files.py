"""Labels in files next to images: NVlabs' dataset.json and Hugging Face's metadata.jsonl and metadata.csv.

dataset.json (StyleGAN2-ADA, EDM) holds {"labels": [["00000/img00000000.png", 3], ...]}. A metadata file of an imagefolder has
one row per image, with `file_name` and `label`. File names are relative to the folder of the file that holds them. Labels are
class ids, or class names, which are numbered in sorted order.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.files import UNREADABLE

__all__ = [
    "LABEL_FILES",
    "UNLABELED",
    "FileLabels",
    "label_value",
    "number_labels",
    "number_values",
    "read_labels",
]

LABEL_FILES = ("dataset.json", "metadata.jsonl", "metadata.csv")  # the first kind that labels any image is used
NAME, LABEL = "file_name", "label"
UNLABELED = -1  # the number of an image without a label, or of a class that no training image has
SHOWN_COLUMNS = 5
LARGEST_ID = 1_000_000  # larger numbers are names


class FileLabels(NamedTuple):
    """Labels that files give to images: one value per file path, None for an image without a label.

    `source` names the files. `remarks` are complaints about them. `ignored` are files without labels, with the reason.
    """

    values: dict[str, int | str | None]
    source: str
    remarks: list[str]
    ignored: list[str]


class _FormatError(ValueError):
    """The file holds something other than labels of images."""


def read_labels(files: Iterable[Path], images: Iterable[Path]) -> FileLabels:
    """Read the labels of `images` from label files.

    Files of the first kind in LABEL_FILES with a label for any of the images are used. Of two labels for one image, the file
    in the deeper folder wins.
    """
    known = {str(path): None for path in images}
    remarks, ignored = list[str](), list[str]()
    for kind in LABEL_FILES:
        values: dict[str, int | str | None] = {}
        used = list[Path]()
        for file in sorted((f for f in files if f.name.lower() == kind), key=lambda f: (len(f.parts), f)):
            try:
                listed = [(_image_path(file.parent, name), label_value(value)) for name, value in _rows(file)]
            except _FormatError as error:
                ignored.append(f"{file} ({error})")
                continue
            except (*UNREADABLE, csv.Error) as error:
                remarks.append(f"cannot read the labels in {file}: {error}")
                continue
            found = dict(listed)
            if twice := [name for name, label in listed if label != found[name]]:
                remarks.append(
                    f"{file} has several labels for one image, and the last is used: {len(set(twice)):,} ({twice[0]}"
                    f"{', ...' if len(set(twice)) > 1 else ''})"
                )
            if absent := [name for name in found if name not in known and not os.path.exists(name)]:  # noqa: PTH110
                remarks.append(
                    f"{file} lists images that do not exist: {len(absent):,} ({absent[0]}{', ...' if len(absent) > 1 else ''})"
                )
            values |= {name: label for name, label in found.items() if name in known}
            used.append(file)
        if any(label is not None for label in values.values()):
            more = f" and {len(used) - 1} more" if len(used) > 1 else ""
            return FileLabels(known | values, f"{used[0]}{more}", remarks, ignored)
        remarks += [f"{file} labels none of the images" for file in used]
    return FileLabels({}, "", remarks, ignored)


def number_labels(labels: FileLabels, training: Sequence[Path]) -> tuple[dict[str, int], list[str]]:
    """Number the labels: class ids keep their numbers, names get numbers in the sorted order of the training images' names.

    Returns:
        The number of each image path (UNLABELED for no label or a class without training images), and the class names.
    """
    values = labels.values
    number_of, names = number_values(value for path in training if (value := values[str(path)]) is not None)
    return {path: UNLABELED if v is None else number_of.get(v, UNLABELED) for path, v in values.items()}, names


def number_values(values: Iterable[int | str]) -> tuple[dict[int | str, int], list[str]]:
    """Number the labels of the training images as `number_labels` does.

    Returns:
        The number of each label, and the class names.
    """
    present = set(values)
    ids = {int(value): value for value in present if _is_id(value)}
    if len(ids) == len(present):
        names = [str(number) for number in range(max(ids, default=-1) + 1)]
        number_of = {value: int(value) for value in present}
        return number_of | {kind(number): number for number in ids for kind in (int, str)}, names
    names = sorted({str(value) for value in present})
    number_of_name = {name: number for number, name in enumerate(names)}
    return {value: number_of_name[str(value)] for value in present}, names


def _is_id(value: int | str) -> bool:
    return int(value) <= LARGEST_ID if isinstance(value, int) or value.isdecimal() else False


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the image names and labels in a label file.

    Raises:
        _FormatError: it has another format, or no labels.
    """
    text = file.read_text(encoding="utf-8-sig")
    if file.name.lower() == "dataset.json":
        content = json.loads(text)
        pairs = content.get("labels") if isinstance(content, dict) else None
        if isinstance(pairs, dict):
            pairs = list(pairs.items())
        if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            raise _FormatError("without a list of image names and labels")
        yield from ((str(name), value) for name, value in pairs)
        return
    rows: Iterable[Any]
    if file.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(text))
    else:
        rows = (json.loads(line) for line in text.splitlines() if line.strip())
    for row in rows:
        if not isinstance(row, dict) or row.get(NAME) is None or LABEL not in row:
            found = ", ".join(map(repr, list(row)[:SHOWN_COLUMNS])) if isinstance(row, dict) else "no columns"
            raise _FormatError(f"without the columns {NAME} and {LABEL}, but with {found}")
        yield str(row[NAME]), row[LABEL]


def label_value(value: Any) -> int | str | None:
    """A class id or name; None for no label.

    Raises:
        _FormatError: the value is a vector or another structure.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and np.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        value = value.strip()
    if value in (None, "", "-1") or (isinstance(value, int) and value < 0):
        return None
    if isinstance(value, int | str):
        return value
    raise _FormatError("its labels are not class ids or names")


def _image_path(folder: Path, name: str) -> str:
    """The path of an image as `str(path)` gives it."""
    path = os.path.join("" if folder == Path() else folder, name.replace("\\", "/"))  # noqa: PTH118
    return os.path.normpath(path) if "./" in path or "//" in path else path
