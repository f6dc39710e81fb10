"""`build_latents --format lightningdit` writes latents that are read back unchanged, with the statistics of all of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from command_line import parse_options
from datasets_prep import build_latents
from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.formats import latent_shards
from datasets_prep.latent_cache import build_latent_cache, open_latent_cache
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from options import UsageError
from runtime.distributed import Processes
from runtime.precision import Machine
from tests.plain_autoencoder import PlainAutoencoder
from tests.written_formats import random_images

COUNT = 24
IMAGES = random_images(COUNT)


@pytest.fixture
def data(tmp_path):
    """Images in two class folders, and an autoencoder: factor 2, two latent channels."""
    for row, image in enumerate(IMAGES):
        path = tmp_path / "images" / "ab"[row % 2] / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(3, (8, 8), 2, 16, {}).save_pretrained(tmp_path / "ae")
    return tmp_path


def build(data, *more):
    flags = ["--dataset", "folder", "--datadir", data / "images", "--image_size", 16, "--format", "lightningdit"]
    flags += ["--pretrained_autoencoder_ckpt", data / "ae", "--precision", "fp32", "--device", "cpu", *more]
    build_latents.main(parse_options("", build_latents.GROUPS, list(map(str, flags))), Processes())


def test_written_latents_are_read_back(data, monkeypatch):
    monkeypatch.setattr(latent_shards, "ROWS_PER_SHARD", 9)
    build(data)
    folder = data / "images" / "lightningdit"
    files = sorted(path.name for path in (folder / "train").iterdir())
    assert files == [*(f"latents_rank00_shard{n:03d}.safetensors" for n in range(3)), "latents_stats.pt"]
    stored = [load_file(path) for path in sorted((folder / "train").glob("*.safetensors"))]
    latents, mirrored = (torch.cat([each[name] for each in stored]) for name in ("latents", "latents_flip"))
    read = {split: open_dataset(DatasetOptions("folder", str(folder), 16), split) for split in ("train", "validation")}
    images = open_dataset(DatasetOptions("folder", str(data / "images"), 16), "train")
    rows = torch.arange(len(images))
    assert (len(read["train"]), len(read["validation"])) == (23, 1)
    assert read["train"].labels.tolist() == images.labels.tolist()
    assert torch.equal(read["train"].stored(rows, torch.zeros(23).bool()), latents)
    assert torch.equal(read["train"].stored(rows, torch.ones(23).bool()), mirrored)

    autoencoder = load_autoencoder(AutoencoderOptions(str(data / "ae")), 3)
    for found, flipped in ((latents, False), (mirrored, True)):
        moments = autoencoder.encode(torch.stack([images[i].flip(2) if flipped else images[i] for i in range(23)]))
        mean, logvar = moments.chunk(2, 1)
        deviations = (found - mean) / (0.5 * logvar).exp()
        assert abs(float(deviations.mean())) < 0.05
        assert float(deviations.std()) == pytest.approx(1, abs=0.05)
    statistics = torch.load(folder / "train" / "latents_stats.pt", weights_only=True)
    torch.testing.assert_close(statistics["mean"], latents.mean((0, 2, 3), keepdim=True))
    torch.testing.assert_close(statistics["std"], latents.std((0, 2, 3), keepdim=True, correction=0))
    held_out = torch.load(folder / "validation" / "latents_stats.pt", weights_only=True)
    assert {name: value.tolist() for name, value in held_out.items()} == {
        name: value.tolist() for name, value in statistics.items()
    }
    assert (
        len(open_dataset(DatasetOptions("folder", str(data / "images"), 16), "train")) == 23
    )  # the folder is not read
    build(data)
    again = load_file(folder / "train" / "latents_rank00_shard001.safetensors")
    assert torch.equal(again["latents"], stored[1]["latents"])


@pytest.fixture
def codes(tmp_path):
    """Cached latents [23, 12, 8, 8] of an autoencoder without a posterior."""
    np.savez(tmp_path / "images.npz", IMAGES)
    dataset = open_dataset(DatasetOptions("folder", str(tmp_path / "images.npz"), 16), "train")
    autoencoder, folder = PlainAutoencoder(3), tmp_path / "cache"
    build_latent_cache(folder, dataset, autoencoder, Machine(torch.device("cpu"), "fp32"))
    return open_latent_cache(folder, dataset, autoencoder), autoencoder


def test_without_a_posterior_latents_are_the_code_itself(codes, tmp_path):
    source, autoencoder = codes
    latent_shards.write_latent_shards(tmp_path / "out", source, autoencoder, "train", flips=False)
    stored = load_file(tmp_path / "out" / "latents_rank00_shard000.safetensors")
    expected = source.moments(torch.arange(len(source)), torch.zeros(len(source)).bool())
    assert torch.equal(stored["latents"], expected.float())
    assert torch.equal(stored["latents_flip"], stored["latents"])


def test_shards_of_large_latents_have_fewer_images(codes, tmp_path, monkeypatch):
    source, autoencoder = codes
    image_bytes = 2 * 4 * source.moments(torch.tensor([0]), torch.tensor([False])).numel()
    monkeypatch.setattr(latent_shards, "BYTES_PER_SHARD", 10 * image_bytes - 1, raising=False)
    latent_shards.write_latent_shards(tmp_path / "out", source, autoencoder, "train", flips=True)
    stored = [load_file(path)["latents"] for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert [len(latents) for latents in stored] == [9, 9, 5]
    expected = source.moments(torch.arange(len(source)), torch.zeros(len(source)).bool())
    assert torch.equal(torch.cat(stored), expected.float())


def test_other_files_are_never_replaced(data):
    (data / "out" / "train").mkdir(parents=True)
    (data / "out" / "train" / "photo.png").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"holds other files, such as photo\.png: .* --latent_shards_dir"):
        build(data, "--latent_shards_dir", data / "out")
    assert (data / "out" / "train" / "photo.png").exists()


def test_latents_are_not_encoded_again(data):
    build(data)
    with pytest.raises(UsageError, match="holds latents already"):
        build(data, "--datadir", data / "images" / "lightningdit")
