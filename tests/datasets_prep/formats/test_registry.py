"""Formats are recognized by their files, and every one is reported, fingerprinted, shuffled and resumed alike."""

import shutil

import numpy as np
import pytest
import torch

from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.folder_layout.report import show_data
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import open_moments
from models.autoencoders.pixels import PixelSpace
from options import UsageError
from runtime.distributed import Processes
from runtime.precision import Machine
from tests.drawn_batches import draw_batches
from tests.plain_autoencoder import PlainAutoencoder
from tests.written_formats import (
    SIDE,
    WRITERS,
    encode,
    random_images,
    write_edm,
    write_lightningdit,
    write_tars,
    zip_folder,
)

COUNT = 41
LABELS = [row % 2 for row in range(COUNT)]
IMAGES = random_images(COUNT)
MACHINE = Machine(torch.device("cpu"), "fp32")


def latents_of(images, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(1, 3, (len(images), 12, 8, 8)).astype(np.float32))


def write_zip(folder, images, labels):
    write_edm(folder, None, labels, images)
    zip_folder(folder / "images")
    shutil.rmtree(folder / "images")


def write_latent_folder(folder, images, labels):
    write_edm(folder, latents_of(images).abs().numpy()[:, [0, 0]], labels)


def write_shards(folder, images, labels):
    write_lightningdit(folder, latents_of(images), labels, latents_of(images, 1))


IMAGE_FORMATS = {**WRITERS, "zip": write_zip}
LATENT_FORMATS = {"EDM2": write_latent_folder, "LightningDiT": write_shards}


def open_split(folder, split="train", **settings):
    return open_dataset(DatasetOptions("folder", str(folder), SIDE, **settings), split)


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_images_and_labels_equal_the_files(tmp_path, kind, capsys):
    IMAGE_FORMATS[kind](tmp_path / "data", IMAGES, LABELS)
    train, held_out = open_split(tmp_path / "data"), open_split(tmp_path / "data", "validation")
    rows = np.arange(COUNT)
    for dataset, kept in ((train, rows[rows % 20 != 19]), (held_out, rows[rows % 20 == 19])):
        assert dataset.labels.tolist() == [LABELS[row] for row in kept]
        for index in (0, len(kept) // 2, len(kept) - 1):
            np.testing.assert_array_equal(dataset[index].permute(1, 2, 0).numpy(), IMAGES[kept[index]])
    show_data(train, held_out)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data        folder, 39 training images, 2 held out (every twentieth)"
    names = "cat 21, dog 18" if kind == "parquet" else "0 21, 1 18"
    assert lines[1].startswith("classes     2 from ")
    assert lines[1].endswith(names)
    assert [line.split("  ")[0] for line in lines] == ["data", "classes", "left out"]


@pytest.mark.parametrize("kind", [*IMAGE_FORMATS, *LATENT_FORMATS])
def test_fingerprints_follow_the_contents(tmp_path, kind):
    write = (IMAGE_FORMATS | LATENT_FORMATS)[kind]
    write(tmp_path / "a", IMAGES, LABELS)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    write(tmp_path / "b", IMAGES[:-1], LABELS[:-1])
    first, copy, other = (open_split(tmp_path / name).fingerprint for name in ("a", "copy", "b"))
    assert first == copy == open_split(tmp_path / "a").fingerprint
    assert first != other
    assert first != open_split(tmp_path / "a", "validation").fingerprint


@pytest.mark.parametrize("kind", [*IMAGE_FORMATS, *LATENT_FORMATS])
def test_order_depends_on_neither_processes_nor_restarts(tmp_path, kind):
    (IMAGE_FORMATS | LATENT_FORMATS)[kind](tmp_path, IMAGES, LABELS)

    def draw(first, last, batch_size, processes=Processes()):  # noqa: B008
        dataset = open_split(tmp_path)
        autoencoder = PixelSpace(3) if kind in IMAGE_FORMATS else PlainAutoencoder(3)
        if kind == "EDM2":
            autoencoder.latent_channels = 2
        source = open_moments(dataset, autoencoder, DatasetOptions(), LatentCacheOptions(True), MACHINE)
        settings = {"num_classes": 2, "device": MACHINE.device, "batch_size": batch_size}
        flips = dataset.facts.flips
        return list(draw_batches(source, autoencoder, first, last, flips=flips, processes=processes, **settings))

    whole = draw(0, 6, 8)
    resumed = draw(4, 6, 8)
    for one, other in zip(whole[4:], resumed, strict=True):
        assert torch.equal(one.data, other.data)
        assert torch.equal(one.condition.labels, other.condition.labels)
    ranks = [draw(0, 6, 4, Processes(rank, 2)) for rank in range(2)]
    for one, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(one.data, torch.cat([part.data for part in parts]))
    assert not torch.equal(whole[0].data, whole[5].data)


def test_images_beside_an_archive_are_read_as_before(tmp_path):
    write_tars(tmp_path, IMAGES[:4], LABELS[:4])
    for row in range(25):
        (tmp_path / "ab"[row % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[row % 2] / f"{row}.png").write_bytes(encode(IMAGES[row]))
    dataset = open_split(tmp_path)
    assert (len(dataset), dataset.facts.class_names) == (24, ("a", "b"))


@pytest.mark.parametrize("base", ["", "train", "images/train"])
def test_images_in_many_class_folders_win_over_an_archive(tmp_path, base):
    """Most of the class folders are empty, so that the test is fast."""
    for number in range(1100):
        (tmp_path / base / f"{number:04d}").mkdir(parents=True)
    for row in range(4):
        (tmp_path / base / f"{row * 300:04d}" / "a.png").write_bytes(encode(IMAGES[row]))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert open_split(tmp_path).facts.class_names == ("0000", "0300", "0600", "0900")


def test_a_single_file_keeps_its_caches_next_to_it(tmp_path):
    write_zip(tmp_path, IMAGES, LABELS)
    data = DatasetOptions("folder", str(tmp_path / "images.zip"), SIDE)
    assert len(open_dataset(data, "train")) == 39
    assert data.derived == tmp_path / "images.zip.derived"


def test_other_files_are_named(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"is not a directory"):
        open_split(tmp_path / "file.bin")
    with pytest.raises(UsageError, match=r"no images in .*\.bin"):
        open_split(tmp_path)
