import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from datasets_prep import idx
from datasets_prep.datasets import (
    DATASETS,
    DatasetFacts,
    DatasetOptions,
    crop_padding,
    like_originals,
    open_dataset,
)
from datasets_prep.idx import CLASSES, find_idx_folder, read_idx
from datasets_prep.images import read_image
from options import UsageError


def open_folder(folder, split="train", **settings):
    return open_dataset(DatasetOptions(dataset="folder", datadir=str(folder), image_size=16, **settings), split)


@pytest.mark.parametrize(("split", "prefix", "count"), [("train", "train", 60000), ("validation", "t10k", 10000)])
def test_fashion_mnist_is_the_file_padded_with_black(fashion_mnist_dir, split, prefix, count):
    dataset = open_dataset(DatasetOptions(datadir=str(fashion_mnist_dir)), split)
    folder = find_idx_folder("fashion_mnist", fashion_mnist_dir)
    images = read_idx(folder, f"{prefix}-images-idx3-ubyte")
    assert len(dataset) == count
    np.testing.assert_array_equal(dataset.labels.numpy(), read_idx(folder, f"{prefix}-labels-idx1-ubyte"))
    for index in [0, 17, count - 1]:
        padded = np.zeros((1, 32, 32), np.uint8)
        padded[0, 2:30, 2:30] = images[index]
        np.testing.assert_array_equal(dataset[index].numpy(), padded)
    cropped = crop_padding(torch.stack([dataset[index] for index in range(8)]), dataset.facts)
    np.testing.assert_array_equal(cropped[:, 0].numpy(), images[:8])
    assert (dataset.facts.crop, dataset.facts.flips, dataset.facts.class_names) == (28, False, CLASSES["fashion_mnist"])


def test_each_split_has_a_different_fingerprint(fashion_mnist_dir):
    options = DatasetOptions(datadir=str(fashion_mnist_dir))
    train, again, validation = (open_dataset(options, split) for split in ("train", "train", "validation"))
    assert train.fingerprint == again.fingerprint != validation.fingerprint


def test_unpadded_images_need_no_crop(fashion_mnist_dir):
    dataset = open_dataset(DatasetOptions(datadir=str(fashion_mnist_dir), image_size=28), "validation")
    assert dataset.facts.crop is None
    batch = dataset[0][None]
    assert batch.shape == (1, 1, 28, 28)
    assert torch.equal(crop_padding(batch, dataset.facts), batch)


def test_decoded_images_are_cropped_like_the_originals():
    gray, color = (DatasetFacts("toy", 32, channels, 28, False, ()) for channels in (1, 3))
    decoded = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inside = decoded[:, :, 2:30, 2:30]
    assert torch.equal(like_originals(decoded, color), inside)
    expected = (inside.double().sum(1, keepdim=True) / 3).round().byte()
    assert torch.equal(like_originals(decoded, gray), expected)
    assert torch.equal(like_originals(decoded[:, :1], gray), inside[:, :1])


@pytest.mark.parametrize("size", [27, 26, 33, 16])
def test_idx_image_size_must_be_even_and_no_smaller(size):
    with pytest.raises(UsageError, match=f"28 x 28 .*but got --image_size {size}"):
        open_dataset(DatasetOptions(image_size=size), "train")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((3, 28, 28), [1, 2], r"found \(3, 28, 28\) and \(2,\)"),
        ((2, 28, 27), [1, 2], r"found \(2, 28, 27\)"),
        ((2, 28, 28), [1, 10], "expected labels 0 to 9, but found 10"),
    ],
)
def test_idx_files_that_do_not_fit(monkeypatch, tmp_path, images, labels, message):
    arrays = {"images": np.zeros(images, np.uint8), "labels": np.array(labels, np.uint8)}
    monkeypatch.setattr(idx, "find_idx_folder", lambda name, datadir: tmp_path)
    monkeypatch.setattr(idx, "read_idx", lambda folder, name: arrays[name.split("-")[1]])
    with pytest.raises(UsageError, match=message):
        open_dataset(DatasetOptions(), "train")


def test_unknown_dataset_lists_the_known_ones():
    with pytest.raises(
        UsageError, match="unknown dataset 'fashion': expected one of fashion_mnist, mnist, folder"
    ) as raised:
        open_dataset(DatasetOptions(dataset="fashion"), "train")
    explained = {field.name: field.metadata["help"] for field in dataclasses.fields(DatasetOptions)}["dataset"]
    for name in DATASETS:
        assert name in str(raised.value)
        assert name in explained


def test_idx_fingerprint_covers_the_labels(monkeypatch, tmp_path):
    arrays = {"images": np.zeros((2, 28, 28), np.uint8), "labels": np.array([1, 2], np.uint8)}
    monkeypatch.setattr(idx, "find_idx_folder", lambda name, datadir: tmp_path)
    monkeypatch.setattr(idx, "read_idx", lambda folder, name: arrays[name.split("-")[1]])
    fingerprints = {open_dataset(DatasetOptions(), "train").fingerprint}
    for key in arrays:
        arrays[key] = arrays[key].copy()
        arrays[key].flat[0] = 3
        fingerprints.add(open_dataset(DatasetOptions(), "train").fingerprint)
    assert len(fingerprints) == 3


def test_folder_splits_partition_the_images(photo_dir):
    train, validation = open_folder(photo_dir), open_folder(photo_dir, "validation")
    paths = sorted(photo_dir.rglob("*.*"))
    held_out = [19]  # one in twenty of 25
    kept = [index for index in range(25) if index not in held_out]
    assert (len(train), len(validation)) == (24, 1)
    for dataset, indices in [(train, kept), (validation, held_out)]:
        for position, index in enumerate(indices):
            assert torch.equal(dataset[position], read_image(paths[index], 16))
            assert dataset.labels[position] == ["cat", "dog"].index(paths[index].parent.name)
    assert train.facts.class_names == validation.facts.class_names == ("cat", "dog")
    assert train.facts.flips
    assert train.facts.channels == 3


def test_labels_if_a_split_lacks_a_class(photo_dir):
    """The only held-out image is a dog. Its label must be the dog's class among the training images, not 0."""
    validation = open_folder(photo_dir, "validation")
    assert validation.labels.tolist() == [1]


def test_separate_validation_folder(photo_dir, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(photo_dir, root / "train")
    (root / "val").mkdir()
    shutil.copytree(photo_dir / "dog", root / "val" / "dog")
    train, validation = open_folder(root), open_folder(root, "validation")
    assert (len(train), len(validation)) == (25, 11)
    assert train.labels.bincount().tolist() == [14, 11]
    assert validation.labels.tolist() == [1] * 11
    assert validation.facts.class_names == ("cat", "dog")
    shutil.copytree(photo_dir / "dog", root / "val" / "eel")
    validation = open_folder(root, "validation")
    assert validation.labels.tolist() == [1] * 11
    assert any(
        "held-out files of no training class, which are left out: 11" in text and "eel" in text
        for text in validation.survey.warnings
    )


def test_a_folder_named_train_is_not_a_class(photo_dir, tmp_path):
    shutil.copytree(photo_dir, tmp_path / "root" / "train")
    assert open_folder(tmp_path / "root").facts.class_names == ("cat", "dog")
    shutil.copytree(photo_dir / "cat", tmp_path / "root" / "bus")  # now "train" is also a class, of vehicles
    assert open_folder(tmp_path / "root").facts.class_names == ("bus", "train")


def test_images_next_to_the_folders_mean_no_classes(photo_dir):
    shutil.copy(photo_dir / "cat" / "00.jpg", photo_dir / "zero.JPG")
    dataset = open_folder(photo_dir)
    assert dataset.facts.class_names == ()
    assert dataset.labels.unique().tolist() == [0]
    assert len(dataset) == 25  # 26 images, one of them held out


def test_a_single_image_is_in_both_splits(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "one.png")
    assert len(open_folder(tmp_path)) == len(open_folder(tmp_path, "validation")) == 1


def test_fingerprint_changes_with_a_file(photo_dir):
    before = open_folder(photo_dir).fingerprint
    assert open_folder(photo_dir).fingerprint == before
    Image.new("RGB", (20, 20), "red").save(photo_dir / "cat" / "00.jpg")
    changed = open_folder(photo_dir).fingerprint
    (photo_dir / "dog" / "00.png").rename(photo_dir / "dog" / "zz.png")
    assert len({before, changed, open_folder(photo_dir).fingerprint}) == 3


def test_bad_image_is_an_error_that_names_it_or_is_left_out(photo_dir, capsys):
    bad = photo_dir / "cat" / "03.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    dataset = open_folder(photo_dir)
    with pytest.raises(UsageError, match=r"03\.jpg"):
        dataset[3]
    capsys.readouterr()
    kept = open_folder(photo_dir, skip_bad_images=True)
    assert len(kept) == 23
    assert kept.labels.bincount().tolist() == [13, 10]
    assert torch.equal(kept[3], dataset[4])
    warning = capsys.readouterr().err
    assert "left out 1 of 24 images" in warning
    assert str(bad) in warning


def test_folder_of_bad_images_only(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="none of the 2 training images can be read"):
        open_folder(tmp_path, skip_bad_images=True)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UsageError, match="absent is not a directory"):
        open_folder(tmp_path / "absent")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=rf"no images in {tmp_path}: expected files ending in .*\.jpg"):
        open_folder(tmp_path)


def test_head_is_the_first_images(photo_dir):
    dataset = open_folder(photo_dir)
    head = dataset.head(16)
    assert len(head) == 16
    assert head.labels.tolist() == dataset.labels[:16].tolist()
    assert torch.equal(head[15], dataset[15])
    assert len({dataset.fingerprint, head.fingerprint, dataset.head(15).fingerprint}) == 3
