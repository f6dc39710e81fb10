"""EDM2's and REPA's folders and zip files: means with standard deviations, images, and labels by name or number."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch

from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.latents import StoredMoments
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder
from options import UsageError
from tests.written_formats import random_images, write_edm, zip_folder

COUNT = 25
LABELS = [row % 3 for row in range(COUNT)]
IMAGES = random_images(COUNT)
MOMENTS = np.abs(np.random.default_rng(0).normal(size=(COUNT, 4, 8, 8))).astype(np.float32)
TRAIN = [row for row in range(COUNT) if row % 20 != 19]


@pytest.fixture(scope="module")
def autoencoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PretrainedAutoencoder(new_autoencoder_kl(3, (8, 8), 2, 16, {}), "ae", 0.5)


def open_split(folder, split="train"):
    return open_dataset(DatasetOptions("folder", str(folder), 16), split)


@pytest.mark.parametrize("packed", ["folder", "stored", "deflated"])
def test_samples_have_the_stored_mean_and_deviation(tmp_path, autoencoder, packed):
    write_edm(tmp_path, MOMENTS, LABELS)
    if packed != "folder":
        zip_folder(tmp_path / "vae-sd", zipfile.ZIP_STORED if packed == "stored" else zipfile.ZIP_DEFLATED)
        shutil.rmtree(tmp_path / "vae-sd")
    train = open_split(tmp_path)
    assert (train.labels.tolist(), train.facts.flips) == ([LABELS[row] for row in TRAIN], False)
    rows = torch.tensor([4, 0])
    moments = StoredMoments(train, autoencoder).moments(rows, torch.zeros(2).bool())
    mean, std = torch.from_numpy(MOMENTS[[TRAIN[4], TRAIN[0]]]).chunk(2, dim=1)
    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(autoencoder.sample(moments, noise), 0.5 * (mean + std * noise))
    other = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(autoencoder.sample(moments, noise), autoencoder.sample(moments, other))


def test_with_both_folders_latents_train_and_images_score(tmp_path, autoencoder):
    write_edm(tmp_path, MOMENTS, LABELS, IMAGES)
    train = open_split(tmp_path)
    assert train.has_images
    train.check_images("--eval_samples")
    for dataset in (train, train.head(5)):
        np.testing.assert_array_equal(dataset[3].permute(1, 2, 0).numpy(), IMAGES[TRAIN[3]])
    assert StoredMoments(train, autoencoder).moments(torch.tensor([0]), torch.tensor([False])).shape == (1, 4, 8, 8)
    with pytest.raises(UsageError, match="or the folder of the images as --datadir"):
        StoredMoments(train, PixelSpace(3))
    (tmp_path / "images" / "00001" / "img00000013.png").unlink()
    with pytest.raises(UsageError, match=r"lacks the images of 1 latents in .*img-mean-std-00000013\.npy"):
        open_split(tmp_path)


def test_a_damaged_image_leaves_out_its_latent(tmp_path, autoencoder):
    write_edm(tmp_path, MOMENTS, LABELS, IMAGES)
    (tmp_path / "images" / "00000" / "img00000002.png").write_bytes(b"damaged")
    whole, kept = open_split(tmp_path), open_dataset(DatasetOptions("folder", str(tmp_path), 16, True), "train")
    assert (len(whole), len(kept)) == (24, 23)
    upright = torch.zeros(2).bool()
    assert torch.equal(kept.stored(torch.tensor([1, 2]), upright), whole.stored(torch.tensor([1, 3]), upright))
    assert torch.equal(kept[2], whole[3])
    assert StoredMoments(kept, autoencoder).labels.tolist() == [LABELS[row] for row in TRAIN if row != 2]


def test_each_folder_can_be_named(tmp_path):
    write_edm(tmp_path, MOMENTS, LABELS, IMAGES)
    images, latents = open_split(tmp_path / "images"), open_split(tmp_path / "vae-sd")
    assert images.labels.tolist() == latents.labels.tolist() == [LABELS[row] for row in TRAIN]
    np.testing.assert_array_equal(images[7].permute(1, 2, 0).numpy(), IMAGES[TRAIN[7]])
    assert not latents.has_images


def test_labels_of_images_are_found_by_number(tmp_path):
    """REPA's latents may share the images' dataset.json."""
    write_edm(tmp_path, MOMENTS, LABELS, IMAGES)
    (tmp_path / "images" / "dataset.json").rename(tmp_path / "dataset.json")
    (tmp_path / "vae-sd" / "dataset.json").unlink()
    assert open_split(tmp_path).labels.tolist() == [LABELS[row] for row in TRAIN]


@pytest.mark.parametrize("shared", [False, True])
def test_fingerprints_follow_the_bytes(tmp_path, shared):
    def write(moments, labels):
        write_edm(tmp_path / "data", moments, labels)
        if shared:
            (tmp_path / "data" / "vae-sd" / "dataset.json").rename(tmp_path / "data" / "dataset.json")
        return open_split(tmp_path / "data").fingerprint

    first = write(MOMENTS, LABELS)
    assert write(MOMENTS, LABELS) == first
    assert write(2 * MOMENTS, LABELS) != first
    assert write(MOMENTS, LABELS[::-1]) != first


def test_wrong_files_are_named(tmp_path):
    write_edm(tmp_path, MOMENTS, LABELS)
    file, array = tmp_path / "vae-sd" / "dataset.json", tmp_path / "vae-sd" / "00000" / "img-mean-std-00000003.npy"
    listed = json.loads(file.read_text())
    for content, message in (
        ({"labels": listed["labels"][:-2]}, r"has no label for 2 of 25 files \(00002/img-mean-std-00000023\.npy"),
        ({"labels": [["a.npy", [0.1, 0.2]]]}, "but found another"),
        ([1], "cannot read .*dataset.json"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(UsageError, match=message):
            open_split(tmp_path)
    file.write_text('{"labels": null}')
    assert open_split(tmp_path).survey.no_classes.startswith("there are none in ")
    for values, message in (
        (
            MOMENTS[3, :2],
            r"img-mean-std-00000003\.npy of .* has the shape \(2, 8, 8\), but the first latent has \(4, 8, 8\)",
        ),
        (MOMENTS[3, :3], r"expected mean and std \[2 c, h, w\], but found \(3, 8, 8\)"),
        (-MOMENTS[3], "a standard deviation of at least 0"),
        (MOMENTS[3] * np.nan, "a finite mean"),
    ):
        np.save(array, values)
        dataset = open_split(tmp_path)
        with pytest.raises(UsageError, match=message):
            dataset.stored(torch.tensor([3]), torch.tensor([False]))
    array.write_bytes(array.read_bytes()[:-9])
    with pytest.raises(UsageError, match="cannot read the latent 00000/img-mean-std-00000003"):
        open_split(tmp_path).stored(torch.tensor([3]), torch.tensor([False]))


@pytest.mark.parametrize(("compression", "method"), [(zipfile.ZIP_BZIP2, "BZIP2"), (zipfile.ZIP_LZMA, "LZMA")])
def test_other_compression_is_refused(tmp_path, compression, method):
    write_edm(tmp_path, None, LABELS, IMAGES)
    packed = zip_folder(tmp_path / "images", compression)
    message = rf"\.png of .*images\.zip is compressed with {method}, but expected stored or deflated files: pack"
    with pytest.raises(UsageError, match=message):
        open_split(packed)


def test_damaged_zip_files_are_named(tmp_path):
    write_edm(tmp_path, None, LABELS, IMAGES)
    packed = zip_folder(tmp_path / "images")
    data = packed.read_bytes()
    packed.write_bytes(data[:-200])
    with pytest.raises(UsageError, match="cannot read the zip file .*pack it again"):
        open_split(packed)
    packed.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    with pytest.raises(UsageError, match=r"images\.zip: its checksum differs"):
        open_split(packed)[0]
