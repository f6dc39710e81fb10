"""Hugging Face's Parquet and Arrow files: columns, class names, row groups, and what is wrong with other files."""

import builtins

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.images import BadImageError
from options import UsageError
from tests.written_formats import encode, random_images, write_parquet

IMAGES = random_images(23)
LABELS = [row % 2 for row in range(23)]


def open_split(folder, split="train"):
    return open_dataset(DatasetOptions("folder", str(folder), 16), split)


def write(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=5)


def test_class_names_come_from_the_metadata(tmp_path):
    write_parquet(tmp_path, IMAGES, LABELS, ("cat", "dog", "owl"))
    survey = open_split(tmp_path).survey
    assert survey.classes == ("cat", "dog", "owl")
    assert survey.warnings == (f"classes without training images in {tmp_path / 'data'}: 1 (owl)",)
    write_parquet(tmp_path, IMAGES, LABELS, ())
    assert open_split(tmp_path).survey.classes == ("0", "1")


@pytest.mark.parametrize("image", ["image", "img", "jpg"])
@pytest.mark.parametrize("label", ["label", "labels", None])
def test_columns_are_found_by_name(tmp_path, image, label):
    columns = {"id": list(range(23)), image: list(map(encode, IMAGES))}
    write(tmp_path / "train-00000-of-00002.parquet", columns | ({label: LABELS} if label else {}))
    write(tmp_path / "train-00001-of-00002.parquet", columns | ({label: LABELS} if label else {}))
    write(tmp_path / "test-00000-of-00001.parquet", columns | ({label: LABELS} if label else {}))
    train, held_out = open_split(tmp_path), open_split(tmp_path, "validation")
    assert (len(train), len(held_out)) == (46, 23)
    assert train.labels.tolist() == (LABELS * 2 if label else [0] * 46)
    for index in (0, 4, 5, 22, 23, 45):
        np.testing.assert_array_equal(train[index].permute(1, 2, 0).numpy(), IMAGES[index % 23])
    assert ("in a column label or labels" in train.survey.no_classes) == (label is None)


def test_wrong_files_are_named(tmp_path):
    data = list(map(encode, IMAGES[:6]))
    file = tmp_path / "a.parquet"
    for columns, message in (
        ({"text": ["a"]}, "expected a column of images named image, .* but found text"),
        ({"image": data, "label": [[0.5, 0.5]] * 6}, "expected class ids or names in the column label"),
    ):
        write(file, columns)
        with pytest.raises(UsageError, match=message):
            open_split(tmp_path)
    write(file, {"image": data})
    write(tmp_path / "b.parquet", {"img": data})
    with pytest.raises(UsageError, match=r"b\.parquet lacks the column image, which .*a\.parquet has"):
        open_split(tmp_path)
    (tmp_path / "b.parquet").unlink()
    for value, message in (
        (
            {"bytes": None, "path": "0.png"},
            r"row 0 of .*a\.parquet: expected the bytes .* but found a path without bytes",
        ),
        ({"bytes": b"x", "path": ""}, r"row 0 of .*a\.parquet"),
    ):
        write(file, {"image": [value] * 2})
        with pytest.raises(BadImageError, match=message):
            open_split(tmp_path)[0]
    write(file, {"image": data, "label": list(range(6))})
    damaged = file.read_bytes()
    file.write_bytes(damaged[:4] + bytes(400) + damaged[404:])
    with pytest.raises(UsageError, match=r"cannot read .*a\.parquet.*download or write it again"):
        open_split(tmp_path)[0]
    file.write_bytes(damaged[:-10])
    with pytest.raises(UsageError, match=r"cannot read .*a\.parquet.*download or write it again"):
        open_split(tmp_path)


def test_the_error_without_pyarrow_says_how_to_install_it(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", {"image": [encode(IMAGES[0])]})
    found = builtins.__import__

    def refuse(name, *arguments):
        if name == "pyarrow":
            raise ImportError(name)
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match="needs the package pyarrow: pip install pyarrow"):
        open_split(tmp_path)
