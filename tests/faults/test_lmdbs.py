"""LMDBs that are damaged, named otherwise, or on a file system without locks."""

import errno
import io
import os

import lmdb
import numpy as np
import pytest
from PIL import Image

from datasets_prep import build_lmdb as building
from datasets_prep.build_lmdb import BuildLmdbOptions, build_lmdb
from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.images import BadImageError
from evaluation.sources import open_source
from options import UsageError

SIZE = 8


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path, values: dict[bytes, bytes]) -> None:
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


def images(count: int) -> dict[bytes, bytes]:
    return {f"{number:05d}".encode(): png(number) for number in range(count)}


def open_faces(folder):
    return open_dataset(DatasetOptions("celeba_256", str(folder), SIZE), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"expected the file .*train\.lmdb/data\.mdb, but there is none"),
        (b"", r"data\.mdb is empty; download or build it again"),
        (b"<html>quota exceeded</html>" * 400, "cannot open the LMDB"),
    ],
)
def test_a_file_that_was_not_downloaded_is_named(tmp_path, content, message):
    write(tmp_path / "train.lmdb", images(4))
    data = tmp_path / "train.lmdb" / "data.mdb"
    data.unlink()
    if content is not None:
        data.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        open_faces(tmp_path)


def test_lmdbs_of_other_names_are_listed(tmp_path):
    for name, count in (("LMDB_train", 20), ("LMDB_val", 5)):
        write(tmp_path / name, images(count))
    with pytest.raises(
        UsageError, match=r"expected .*train\.lmdb .* holds the LMDBs LMDB_train, LMDB_val: rename them"
    ):
        open_faces(tmp_path)
    assert len(open_faces(tmp_path / "LMDB_train")) == 18


@pytest.mark.parametrize(("side", "chosen"), [(4, 4), (6, 8), (8, 8), (99, 16)])
def test_of_images_in_several_sizes_one_size_is_used(tmp_path, side, chosen, capsys):
    values = {b"length": b"2"}
    for size in (16, 4, 8):
        for number in range(2):
            file = io.BytesIO()
            Image.new("RGB", (size, size), (size, number, 0)).save(file, "PNG")
            values[f"{size}-{number:05d}".encode()] = file.getvalue()
    write(tmp_path / "train.lmdb", values)
    dataset = open_dataset(DatasetOptions("celeba_256", str(tmp_path), side), "train")
    assert [dataset[number][:2, 0, 0].tolist() for number in range(len(dataset))] == [[chosen, 0], [chosen, 1]]
    assert f"each image in 3 sizes (4, 8, 16): {chosen} is used" in " ".join(capsys.readouterr().err.split())


def test_an_empty_value_is_one_bad_image(tmp_path):
    values = images(6) | {b"00003": b""}
    for split, chosen in (("train", values), ("val", images(2))):
        write(tmp_path / f"church_outdoor_{split}_lmdb", chosen)
    dataset = open_dataset(DatasetOptions("lsun_church", str(tmp_path), SIZE), "train")
    assert len(dataset) == 6
    with pytest.raises(BadImageError, match=r"'00003' of .*church_outdoor_train_lmdb: it is empty"):
        dataset[3]
    assert [int(dataset[number][0, 0, 0]) for number in (0, 1, 2, 4, 5)] == [0, 1, 2, 4, 5]


def test_an_lmdb_is_read_without_its_lock_file_and_makes_none(tmp_path):
    """Network file systems may have no locks, and shared data is often read-only."""
    write(tmp_path / "train.lmdb", images(4))
    (tmp_path / "train.lmdb" / "lock.mdb").unlink()
    assert len(open_faces(tmp_path)) == 4
    assert open_source(tmp_path / "train.lmdb").count == 4
    assert [path.name for path in (tmp_path / "train.lmdb").iterdir()] == ["data.mdb"]


def test_an_lmdb_is_built_where_there_are_no_locks(tmp_path, monkeypatch, capsys):
    actual = lmdb.open

    def without_locks(path, **settings):
        if settings.get("lock", True):
            raise lmdb.Error(f"{path}: {os.strerror(errno.ENOLCK)}")
        return actual(path, **settings)

    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(png(number))
    monkeypatch.setattr(building.lmdb, "open", without_locks)
    assert build_lmdb(tmp_path / "out" / "train.lmdb", paths, tmp_path, BuildLmdbOptions(image_size=SIZE)) == 3
    assert "has no locks: do not run this command twice at the same time" in " ".join(capsys.readouterr().err.split())
    dataset = open_faces(tmp_path / "out")
    np.testing.assert_array_equal([int(dataset[number][0, 0, 0]) for number in range(3)], range(3))


def test_other_errors_of_building_are_reported(tmp_path, monkeypatch):
    def refuse(path, **settings):
        raise lmdb.Error(f"{path}: {os.strerror(errno.EACCES)}")

    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "0.png")
    monkeypatch.setattr(building.lmdb, "open", refuse)
    with pytest.raises(UsageError, match="cannot write the LMDB .* Permission denied"):
        build_lmdb(tmp_path / "out" / "train.lmdb", [tmp_path / "0.png"], tmp_path, BuildLmdbOptions(image_size=SIZE))
