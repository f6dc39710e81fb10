import gzip
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from datasets_prep import idx
from datasets_prep.idx import IDX_FILES, find_idx_folder, read_idx
from options import UsageError
from runtime.downloads import TIMEOUT_S

ARRAYS = {
    "train-images-idx3-ubyte": np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4),
    "train-labels-idx1-ubyte": np.array([7, 9], np.uint8),
    "t10k-images-idx3-ubyte": np.full((1, 3, 4), 200, np.uint8),
    "t10k-labels-idx1-ubyte": np.array([0], np.uint8),
}


def encode(array):
    """Encode in the IDX format: two zero bytes, the type (8: uint8), the number of axes, big-endian lengths, and the values."""
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()


def fill(folder, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ARRAYS.items():
        data = encode(array)
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return folder


@pytest.fixture
def no_fetching(monkeypatch):
    """Make both download methods fail, and record the order of the attempts."""
    tried = []

    def download(name, datadir):
        tried.append("torchvision")
        raise RuntimeError("first line\nno route to host")

    def fetch_deb(name, datadir):
        tried.append("apt-get")
        raise subprocess.CalledProcessError(100, "apt-get", stderr=b"W: slow\nE: no package\n")

    monkeypatch.setattr(idx, "_download", download)
    monkeypatch.setattr(idx, "_fetch_deb", fetch_deb)
    monkeypatch.setattr(idx, "DEBIAN_PACKAGES", {"mnist": "dataset-mnist"})  # a package that does not exist
    return tried


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_values_and_axes(tmp_path, suffix):
    folder = fill(tmp_path, suffix)
    for name, array in ARRAYS.items():
        found = read_idx(folder, name)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, array)


def test_real_files_hold_balanced_classes(fashion_mnist_dir):
    folder = find_idx_folder("fashion_mnist", fashion_mnist_dir)
    labels = read_idx(folder, "train-labels-idx1-ubyte")
    assert np.bincount(labels).tolist() == [6000] * 10
    assert read_idx(folder, "train-images-idx3-ubyte").shape == (60000, 28, 28)
    assert np.bincount(read_idx(folder, "t10k-labels-idx1-ubyte")).tolist() == [1000] * 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:6],
        lambda data: b"",
        lambda data: bytes([0, 0, 9]) + data[3:],  # type 9: signed bytes
        lambda data: b"<html>503 Service Unavailable</html>",
    ],
)
def test_a_truncated_or_foreign_file_is_named(tmp_path, damage):
    name = "train-images-idx3-ubyte"
    path = fill(tmp_path) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=f"{name} is not a complete IDX file of bytes"):
        read_idx(tmp_path, name)


@pytest.mark.parametrize("position", [0, 15, -6, None])  # magic number, deflate stream, checksum, truncation
def test_damaged_gzip_file_is_named(tmp_path, position):
    name = "t10k-images-idx3-ubyte"
    path = fill(tmp_path, ".gz") / f"{name}.gz"
    data = bytearray(path.read_bytes())
    if position is None:
        del data[-10:]
    else:
        data[position] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(UsageError, match=rf"{name}\.gz"):
        read_idx(tmp_path, name)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"train-labels-idx1-ubyte or train-labels-idx1-ubyte\.gz"):
        read_idx(tmp_path, "train-labels-idx1-ubyte")


@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw", "usr/share/datasets/mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_in_the_data_directory_are_found_without_downloading(tmp_path, no_fetching, place, suffix):
    folder = fill(tmp_path / place, suffix)
    assert find_idx_folder("mnist", tmp_path) == folder
    assert no_fetching == []


def test_incomplete_folder_does_not_count(tmp_path, no_fetching):
    fill(tmp_path)
    (tmp_path / IDX_FILES[2]).unlink()
    complete = fill(tmp_path / "mnist")
    assert find_idx_folder("mnist", tmp_path) == complete


def test_the_error_lists_all_attempts(tmp_path, no_fetching, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as raised:
        find_idx_folder("mnist", Path("new", "data"))
    assert list(tmp_path.iterdir()) == []  # a failed download leaves no folder
    assert f"mnist: trying torchvision's download into {tmp_path}/new/data ..." in capsys.readouterr().out
    assert no_fetching == ["torchvision", "apt-get"]
    message = str(raised.value)
    for expected in [
        "cannot find mnist",
        "torchvision's download: no route to host;",
        "apt-get download dataset-mnist: E: no package.",
        f"(or .gz) into {tmp_path}/new/data, or name their folder with --datadir",
        *IDX_FILES,
    ]:
        assert expected in message
    assert "\n" not in message


def test_the_package_is_tried_after_a_failed_download(tmp_path, no_fetching, monkeypatch):
    monkeypatch.setattr(idx, "_fetch_deb", lambda name, datadir: fill(datadir / "usr/share/datasets/mnist", ".gz"))
    folder = find_idx_folder("mnist", tmp_path / "new")
    assert folder == tmp_path / "new/usr/share/datasets/mnist"
    assert no_fetching == ["torchvision"]
    assert find_idx_folder("mnist", tmp_path / "new") == folder
    assert no_fetching == ["torchvision"]  # nothing is downloaded twice


def test_the_download_sets_a_timeout(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(idx, "DEBIAN_PACKAGES", {})

    def dataset(root, download):
        seen.append((Path(root).parent, download, socket.getdefaulttimeout()))
        raise RuntimeError("unreachable")

    monkeypatch.setattr(idx.torchvision.datasets, "MNIST", dataset)
    before = socket.getdefaulttimeout()
    with pytest.raises(UsageError, match="unreachable"):
        find_idx_folder("mnist", tmp_path)
    assert seen == [(tmp_path, True, TIMEOUT_S)]
    assert tmp_path.is_dir()  # it existed before
    assert socket.getdefaulttimeout() == before
