"""Tar files in a store: only byte ranges are read, and the images and their order are those of local files."""

import fsspec
import numpy as np
import pytest
import torch

from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.formats import webdataset
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import open_moments
from models.autoencoders.pixels import PixelSpace
from options import UsageError
from runtime.distributed import Processes
from runtime.precision import Machine
from tests.drawn_batches import draw_batches
from tests.written_formats import random_images, write_tars

IMAGES = random_images(30)
LABELS = [row % 3 for row in range(30)]
MACHINE = Machine(torch.device("cpu"), "fp32")
URL = "memory://train-bucket/data"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store in memory with training and held-out files, next to the same files in a local folder."""
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "local", IMAGES[:24], LABELS[:24], "train", shards=3)
    write_tars(tmp_path / "local", IMAGES[24:], LABELS[24:], "val", shards=1)
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in (tmp_path / "local").iterdir():
        system.pipe(f"/train-bucket/data/{path.name}", path.read_bytes())
    yield system
    system.store.clear()


def open_split(datadir=URL, split="train", **settings):
    return open_dataset(DatasetOptions("folder", str(datadir), 16, **settings), split)


def draw(datadir, first, last, batch_size, processes=Processes()):  # noqa: B008
    source = open_moments(open_split(datadir), PixelSpace(3), DatasetOptions(), LatentCacheOptions(True), MACHINE)
    settings = {"num_classes": 3, "device": MACHINE.device, "batch_size": batch_size, "processes": processes}
    return list(draw_batches(source, PixelSpace(3), first, last, **settings))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_images_and_labels_equal_those_of_local_files(store, tmp_path, split):
    there, here = open_split(split=split), open_split(tmp_path / "local", split)
    assert there.labels.tolist() == here.labels.tolist()
    for index in range(len(here)):
        assert torch.equal(there[index], here[index])


def test_order_depends_on_neither_store_nor_processes_nor_restarts(store, tmp_path):
    whole, local = draw(URL, 0, 5, 8), draw(tmp_path / "local", 0, 5, 8)
    resumed, ranks = draw(URL, 3, 5, 8), [draw(URL, 0, 5, 4, Processes(rank, 2)) for rank in range(2)]
    for one, same, *parts in zip(whole, local, *ranks, strict=True):
        assert torch.equal(one.data, same.data)
        assert torch.equal(one.data, torch.cat([part.data for part in parts]))
    for one, other in zip(whole[3:], resumed, strict=True):
        assert torch.equal(one.data, other.data)


def test_only_the_bytes_of_an_image_are_read(store, monkeypatch):
    dataset, requests = open_split(), []
    whole = type(store).cat_file

    def count(self, path, start=None, end=None, **settings):
        requests.append(end - start)
        return whole(self, path, start, end, **settings)

    monkeypatch.setattr(type(store), "cat_file", count)
    np.testing.assert_array_equal(dataset[5].permute(1, 2, 0).numpy(), IMAGES[5])
    assert len(requests) == 1
    assert requests[0] < 1200  # a file has 16 members and 20 kB
    monkeypatch.setattr(webdataset, "_scan_file", None)
    assert open_split().fingerprint == dataset.fingerprint  # from the index


def test_a_replaced_file_of_equal_size_is_read_again(store, tmp_path):
    before, labels = open_split(), [2 - label for label in LABELS[:24]]
    write_tars(tmp_path / "new", IMAGES[:24][::-1], labels, "train", shards=3)
    for path in (tmp_path / "new").iterdir():
        assert path.stat().st_size == store.size(f"/train-bucket/data/{path.name}")
        store.pipe(f"/train-bucket/data/{path.name}", path.read_bytes())
    after = open_split()
    assert before.labels.tolist() == LABELS[:24]
    assert after.labels.tolist() == labels
    np.testing.assert_array_equal(after[0].permute(1, 2, 0).numpy(), IMAGES[23])
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("key", ["ETag", "LastModified", "mtime"])
def test_the_stores_version_is_preferred_to_a_checksum(store, monkeypatch, key):
    version, listed = {"version": "1"}, type(store).glob

    def glob(self, pattern, **settings):
        return {path: entry | {key: version["version"]} for path, entry in listed(self, pattern, **settings).items()}

    monkeypatch.setattr(type(store), "glob", glob)
    monkeypatch.setattr(type(store), "checksum", None)
    first, same = open_split().fingerprint, open_split().fingerprint
    version["version"] = "2"
    assert first == same != open_split().fingerprint


def test_files_may_be_named_by_a_pattern_or_alone(store):
    assert len(open_split(f"{URL}/train-*.tar")) == 23  # every twentieth is held out
    assert len(open_split(f"{URL}/val-000000.tar")) == 5


def test_wrong_urls_are_explained(store, monkeypatch):
    for url, message in (
        ("memory://nothing", "no tar files at memory://nothing: expected a folder"),
        ("nonsense://a", "--datadir nonsense://a: .*expected a URL such as s3://bucket/folder"),
    ):
        with pytest.raises(UsageError, match=message):
            open_split(url)
    with pytest.raises(UsageError, match="which only --dataset folder reads, but got celeba_256"):
        open_dataset(DatasetOptions("celeba_256", URL), "train")

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UsageError, match="needs the package s3fs: pip install s3fs"):
        open_split("s3://bucket/data")


def test_truncated_files_and_lost_connections_are_named(store, monkeypatch):
    dataset = open_split()
    monkeypatch.setattr(type(store), "cat_file", lambda self, path, start=None, end=None: b"")
    with pytest.raises(UsageError, match="train-000000.tar is truncated: expected"):
        dataset[0]

    def lost(self, path, start=None, end=None):
        raise ConnectionError("reset")

    monkeypatch.setattr(type(store), "cat_file", lost)
    with pytest.raises(UsageError, match="cannot read .*train-000000.tar: reset; check the connection"):
        dataset[0]
