"""CIFAR-10's batches as pickled by Python 2, in a folder or in the archive."""

import io
import pickle
import tarfile

import numpy as np
import pytest

from datasets_prep import cifar10
from datasets_prep.cifar10 import ARCHIVE, BATCHES, CLASSES, FOLDER
from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.images import crop_array
from options import UsageError
from tests.python2_pickle import python2_pickle

PER_BATCH = 4


@pytest.fixture(scope="module")
def images(squares):
    """Six batches of photographs, uint8 [24, 32, 32, 3]."""
    return np.stack([crop_array(image, 32).permute(1, 2, 0).numpy() for image in squares])


@pytest.fixture(scope="module")
def batches(images):
    """The files' bytes by name. Labels cycle through 0 to 9."""
    names = [name for split in BATCHES.values() for name in split]
    files = {}
    for number, name in enumerate(names):
        rows = slice(PER_BATCH * number, PER_BATCH * (number + 1))
        content = {
            "batch_label": f"batch {number}",
            "labels": [index % 10 for index in range(rows.start, rows.stop)],
            "data": np.ascontiguousarray(images[rows].transpose(0, 3, 1, 2)).reshape(PER_BATCH, 3072),
            "filenames": [f"{index}.png" for index in range(rows.start, rows.stop)],
        }
        files[name] = python2_pickle(content)
    return files


def write_folder(datadir, batches):
    (datadir / FOLDER).mkdir(parents=True)
    for name, data in batches.items():
        (datadir / FOLDER / name).write_bytes(data)


def write_archive(datadir, members):
    with tarfile.open(datadir / ARCHIVE, "w:gz") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def open_split(datadir, split="train", size=32):
    return open_dataset(DatasetOptions("cifar10", str(datadir), size), split)


@pytest.fixture
def no_network(monkeypatch):
    """Make downloads fail, and count them."""
    tried = []

    def download(url, root, filename, md5):
        tried.append((url, md5))
        raise OSError("no route to host")

    monkeypatch.setattr(cifar10, "download_url", download)
    return tried


def assert_whole(datadir, images):
    train, validation = open_split(datadir), open_split(datadir, "validation")
    assert (len(train), len(validation)) == (20, 4)
    for index, image in enumerate(images):
        found = train[index] if index < 20 else validation[index - 20]
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), image)
    assert train.labels.tolist() == [index % 10 for index in range(20)]
    assert (train.facts.class_names, train.facts.flips) == (CLASSES, True)


def test_batches_pickled_by_python_2(tmp_path, batches, images, no_network):
    write_folder(tmp_path, batches)
    assert_whole(tmp_path, images)
    assert open_split(tmp_path, size=64)[0].shape == (3, 64, 64)
    assert no_network == []


def test_the_archive_is_unpacked_in_the_data_directory(tmp_path, batches, images, no_network):
    datadir = tmp_path / "data"
    datadir.mkdir()
    members = {f"{FOLDER}/{name}": data for name, data in batches.items()}
    write_archive(
        datadir, {"../escaped": b"x", f"{FOLDER}/../../escaped": b"x", f"{FOLDER}/readme.html": b"x", **members}
    )
    assert_whole(datadir, images)
    assert sorted(path.name for path in (datadir / FOLDER).iterdir()) == sorted(batches)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (datadir / ARCHIVE).unlink()
    assert_whole(datadir, images)
    assert no_network == []


def test_a_failed_download_is_reported(tmp_path, no_network):
    with pytest.raises(
        UsageError, match=rf"neither {FOLDER}/ nor {ARCHIVE} .*no route to host.*Download https?://.*{ARCHIVE}"
    ):
        open_split(tmp_path / "new")
    assert no_network[0][1] == "c58f30108f718f92721af3b95e74349a"
    assert not (tmp_path / "new").exists()


def test_damaged_files_are_named(tmp_path, batches, no_network):
    write_folder(tmp_path, {**batches, "data_batch_3": batches["data_batch_3"][:-100]})
    with pytest.raises(UsageError, match=r"cannot read .*data_batch_3"):
        open_split(tmp_path)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / ARCHIVE).write_bytes(b"\x1f\x8b" + bytes(100))
    with pytest.raises(UsageError, match=rf"cannot unpack .*{ARCHIVE}"):
        open_split(tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 2]}, r"found uint8 \(4, 3072\) and \(3,\)"),
        ({"labels": [0, 1, 2, 10]}, "but found 0 to 10"),
        ({"data": np.zeros((4, 3072))}, "found float64"),
    ],
)
def test_batches_that_do_not_fit(tmp_path, batches, change, message):
    content = {"labels": [0, 1, 2, 3], "data": np.zeros((4, 3072), np.uint8), **change}
    write_folder(tmp_path, {**batches, "test_batch": python2_pickle(content)})
    with pytest.raises(UsageError, match=message):
        open_split(tmp_path, "validation")


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_batch_is_not_run(tmp_path, batches, capsys):
    write_folder(tmp_path, {**batches, "test_batch": pickle.dumps({"data": Malicious(), "labels": [0]}, protocol=2)})
    with pytest.raises(UsageError, match="print is not a numpy array"):
        open_split(tmp_path, "validation")
    assert capsys.readouterr().out == ""


def test_fingerprint_covers_images_and_labels(tmp_path, batches):
    write_folder(tmp_path, batches)
    fingerprints = {open_split(tmp_path, "validation").fingerprint, open_split(tmp_path).fingerprint}
    data = np.zeros((4, 3072), np.uint8)
    for labels in ([0, 0, 0, 0], [0, 0, 0, 1]):
        (tmp_path / FOLDER / "test_batch").write_bytes(python2_pickle({"data": data, "labels": labels}))
        fingerprints.add(open_split(tmp_path, "validation").fingerprint)
    assert len(fingerprints) == 4
