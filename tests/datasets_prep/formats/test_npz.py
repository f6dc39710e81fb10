"""ADM's reference batches as datasets: memory-mapped or compressed, with or without labels, and statistics are refused."""

import numpy as np
import pytest

from datasets_prep.datasets import DatasetOptions, open_dataset
from options import UsageError
from tests.written_formats import random_images

IMAGES = random_images(22)


def open_split(path, split="train"):
    return open_dataset(DatasetOptions("folder", str(path), 16), split)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_batches_without_labels(tmp_path, save):
    save(tmp_path / "train.npz", IMAGES)
    save(tmp_path / "val.npz", images=IMAGES[::-1], arr_0=IMAGES[::-1])
    train, held_out = open_split(tmp_path), open_split(tmp_path, "validation")
    assert (len(train), len(held_out), train.labels.unique().tolist()) == (22, 22, [0])
    np.testing.assert_array_equal(train[19].permute(1, 2, 0).numpy(), IMAGES[19])
    np.testing.assert_array_equal(held_out[0].permute(1, 2, 0).numpy(), IMAGES[21])
    assert train.survey.no_classes == "there are none in an array arr_1 or labels"


def test_one_file_can_be_named_and_gray_images_get_three_channels(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES[..., :1], np.arange(22) % 2)
    dataset = open_split(tmp_path / "a.npz")
    assert dataset[1].shape == (3, 16, 16)
    assert dataset.labels.tolist() == [row % 2 for row in range(22) if row != 19]


def test_arrays_may_be_named_images_and_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=np.arange(22) % 2)
    dataset = open_split(tmp_path)
    np.testing.assert_array_equal(dataset[1].permute(1, 2, 0).numpy(), IMAGES[1])
    assert dataset.labels.tolist() == [row % 2 for row in range(22) if row != 19]
    assert dataset.survey.source == "from the array arr_1 or labels"


def test_wrong_files_are_named(tmp_path):
    file = tmp_path / "a.npz"
    for arrays, message in (
        (
            {"mu": np.zeros(4), "sigma": np.eye(4)},
            r"holds only statistics \(mu, sigma\), .* for scoring \(--real_img_dir",
        ),
        (
            {"arr_0": IMAGES.astype(np.float32)},
            r"expected images uint8 \[N, H, W, 3\] in arr_0, but found float32 \[22, 16",
        ),
        ({"arr_0": IMAGES[0]}, r"but found uint8 \[16, 16, 3\]"),
        ({"arr_0": IMAGES, "arr_1": np.zeros(3, int)}, r"expected class ids \[22\] in arr_1, .* but found int64 \[3\]"),
        ({"arr_0": IMAGES, "arr_1": np.zeros(22)}, r"but found float64 \[22\]"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(UsageError, match=message):
            open_split(tmp_path)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UsageError, match=r"cannot read .*a\.npz"):
        open_split(tmp_path)
