"""WebDataset's tar files: samples, labels, splits by name, the index, and damaged files."""

import json

import numpy as np
import pytest

from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.formats import webdataset
from datasets_prep.images import BadImageError
from options import UsageError
from tests.written_formats import encode, random_images, write_tar, write_tars

IMAGES = random_images(30)
LABELS = [row % 3 for row in range(30)]


def open_split(folder, split="train"):
    return open_dataset(DatasetOptions("folder", str(folder), 16), split)


def pixels(dataset, index):
    return dataset[index].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("word", ["val", "validation", "test"])
def test_splits_come_from_names(tmp_path, word):
    write_tars(tmp_path, IMAGES[:20], LABELS[:20], "imagenet-train", shards=3)
    write_tars(tmp_path, IMAGES[20:], LABELS[20:], f"imagenet-{word}", shards=1)
    train, held_out = open_split(tmp_path), open_split(tmp_path, "validation")
    assert (train.labels.tolist(), held_out.labels.tolist()) == (LABELS[:20], LABELS[20:])
    np.testing.assert_array_equal(pixels(train, 13), IMAGES[13])
    np.testing.assert_array_equal(pixels(held_out, 4), IMAGES[24])
    assert train.survey.held_out == f"from imagenet-{word}-000000.tar"


def test_splits_come_from_folders(tmp_path):
    write_tars(tmp_path / "train", IMAGES[:20], LABELS[:20], "a")
    write_tars(tmp_path / "val", IMAGES[20:], LABELS[20:], "a")
    assert open_split(tmp_path, "validation").labels.tolist() == LABELS[20:]


def test_kinds_of_members(tmp_path):
    write_tar(tmp_path / "a.tar", {
        "x/1.json": json.dumps({"caption": "a", "label": "dog"}).encode(),
        "x/1.jpg": encode(IMAGES[0], "JPEG"), "x/1.txt": b"a",
        "y/1.webp": encode(IMAGES[1], "WEBP"), "y/1.cls": b"cat\n",
        "2.seg.PNG": encode(IMAGES[2]), "2.cls": b"dog",
        "3.txt": b"no image",
    })  # fmt: skip
    train, held_out = open_split(tmp_path), open_split(tmp_path, "validation")
    assert train.facts.class_names == ("cat", "dog")
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([1, 0], [1])
    np.testing.assert_array_equal(pixels(held_out, 0), IMAGES[2])
    assert train.survey.left_out == ("samples without an image: 1",)


def test_images_without_labels_have_no_classes(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{row}.png": encode(IMAGES[row]) for row in range(4)})
    assert open_split(tmp_path).survey.no_classes == "there are none from .cls or .json files"
    write_tar(tmp_path / "a.tar", {"0.png": encode(IMAGES[0]), "0.cls": b"1", "1.png": encode(IMAGES[1])})
    assert open_split(tmp_path).survey.no_classes == "1 of 2 images have none from .cls or .json files"


def test_files_are_scanned_once(tmp_path, monkeypatch):
    write_tars(tmp_path, IMAGES, LABELS)
    first = open_split(tmp_path)
    (index,) = tmp_path.glob("*_webdataset_index.npz")
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "_scan_file", None)
        again = open_split(tmp_path)
    assert again.fingerprint == first.fingerprint
    assert again.labels.tolist() == first.labels.tolist()
    index.write_bytes(b"damaged")
    assert open_split(tmp_path).labels.tolist() == first.labels.tolist()
    write_tars(tmp_path, IMAGES[::-1], LABELS[::-1])
    np.testing.assert_array_equal(pixels(open_split(tmp_path), 0), IMAGES[-1])


@pytest.mark.parametrize("cut", [700, 1400, 10240 - 1024, 1])
def test_truncated_files_are_named(tmp_path, cut):
    write_tars(tmp_path, IMAGES[:4], LABELS[:4], shards=1)
    path = tmp_path / "train-000000.tar"
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    path.write_bytes(data[: min(cut, end)] if cut > 1 else data[: -(-end // 512) * 512])  # 1: between members
    with pytest.raises(UsageError, match=r"train-000000\.tar is truncated"):
        open_split(tmp_path)


def test_files_that_shrink_later_are_named(tmp_path):
    write_tars(tmp_path, IMAGES[:4], LABELS[:4], shards=1)
    dataset, path = open_split(tmp_path), tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match="is truncated: expected .* bytes at byte"):
        dataset[1]


def test_damaged_images_are_named_and_can_be_left_out(tmp_path, capsys):
    members = {f"{row}.png": encode(IMAGES[row]) if row != 1 else b"damaged" for row in range(5)}
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(BadImageError, match=r"1\.png of .*a\.tar"):
        open_split(tmp_path)[1]
    assert len(open_dataset(DatasetOptions("folder", str(tmp_path), 16, True), "train")) == 3


def test_other_files_are_explained(tmp_path):
    write_tar(tmp_path / "a.tar", {"readme.txt": b"x"})
    with pytest.raises(UsageError, match="holds no images: expected members ending in jpeg, jpg, png, webp"):
        open_split(tmp_path)
    write_tar(tmp_path / "a.tar", {"0.png": encode(IMAGES[0]), "0.cls": b"\xff"})
    with pytest.raises(UsageError, match=r"0\.cls of .*a\.tar: expected a class id or name"):
        open_split(tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    with pytest.raises(UsageError, match="is compressed, .* unpack it"):
        open_split(tmp_path)


def test_held_out_classes_must_be_known(tmp_path):
    write_tars(tmp_path, IMAGES[:6], ["a"] * 3 + ["b"] * 3)
    write_tars(tmp_path, IMAGES[6:8], ["b", "c"], "val")
    with pytest.raises(UsageError, match="a held-out image has the class 'c', .* expected a, b"):
        open_split(tmp_path, "validation")
