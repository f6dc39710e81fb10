import math

import numpy as np
import pytest
import torch

from datasets_prep import latent_cache
from datasets_prep.cached_moments import LatentCache
from datasets_prep.datasets import DatasetFacts, DatasetOptions, ImageDataset
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import EncodedImages, measure_scale, open_moments
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import PixelSpace, images_to_pixels
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.autoencoders.protocol import UNMEASURED
from models.autoencoders.statistics import LatentStatistics
from options import UsageError
from runtime.precision import Machine

MACHINE = Machine(torch.device("cpu"), "fp32")
IMAGES = torch.randint(0, 256, (11, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
INDICES, MIRRORED = torch.tensor([10, 3, 3, 0]), torch.tensor([True, False, True, False])


@pytest.fixture(scope="module")
def autoencoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PretrainedAutoencoder(new_autoencoder_kl(1, (8, 8), 2, 8, {}), "tiny")


def dataset(flips=True):
    facts = DatasetFacts("tiny", 8, 1, None, flips, ("a", "b", "c"))
    return ImageDataset(facts, "train", np.arange(11) % 3, IMAGES.__getitem__, "f")


@pytest.mark.parametrize("flips", [True, False])
def test_cache_and_encoding_on_the_fly_agree(tmp_path, autoencoder, flips, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_BYTES", 1 << 10)
    data = DatasetOptions(datadir=str(tmp_path))
    cached, direct = (
        open_moments(dataset(flips), autoencoder, data, LatentCacheOptions(no_latent_cache=no), MACHINE)
        for no in (False, True)
    )
    assert isinstance(cached, LatentCache)
    assert isinstance(direct, EncodedImages)
    assert len(cached) == len(direct) == 11
    assert torch.equal(cached.labels, direct.labels)
    mirrored = MIRRORED & flips
    torch.testing.assert_close(
        cached.moments(INDICES, mirrored).float(), direct.moments(INDICES, mirrored), rtol=2**-10, atol=1e-5
    )


def test_the_cache_is_in_the_data_directory_or_the_chosen_folder(tmp_path, autoencoder):
    for cache, place in [
        (LatentCacheOptions(), "data/latent_cache"),
        (LatentCacheOptions(False, str(tmp_path / "c")), "c"),
    ]:
        opened = open_moments(dataset(), autoencoder, DatasetOptions(datadir=str(tmp_path / "data")), cache, MACHINE)
        assert opened.folder.parent == tmp_path / place


def test_pixel_space_needs_no_cache(tmp_path):
    source = open_moments(
        dataset(), PixelSpace(1), DatasetOptions(datadir=str(tmp_path)), LatentCacheOptions(), MACHINE
    )
    expected = images_to_pixels(IMAGES[INDICES])
    expected[MIRRORED] = expected[MIRRORED].flip(3)
    assert torch.equal(source.moments(INDICES, MIRRORED), expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.1, -0.3, 1.7, 123.4])
def test_a_constant_channel_cannot_be_scaled_and_its_statistics_are_not_kept(tmp_path, autoencoder, monkeypatch, value):
    def encode(images):
        z = images[:, :, ::2, ::2].float() / 255
        z = torch.cat([z, torch.full_like(z, value)], dim=1)
        return torch.cat([z, torch.full_like(z, -30.0)], dim=1)

    monkeypatch.setattr(autoencoder, "encode", encode)
    monkeypatch.setattr(autoencoder, "statistics", UNMEASURED)
    source = open_moments(dataset(), autoencoder, DatasetOptions(datadir=str(tmp_path)), LatentCacheOptions(), MACHINE)
    with pytest.raises(UsageError, match="tiny have a constant channel"):
        measure_scale(source, autoencoder, flips=True)
    assert source.statistics() is None
    source.keep_statistics(LatentStatistics((0.5, value), (0.3, math.nan)))  # as an earlier version did
    with pytest.raises(UsageError, match="tiny have a constant channel"):
        measure_scale(source, autoencoder, flips=True)


def test_images_are_read_in_order_by_several_workers(tmp_path):
    options = LatentCacheOptions(num_workers=4)
    source = open_moments(dataset(), PixelSpace(1), DatasetOptions(datadir=str(tmp_path)), options, MACHINE)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    upright = torch.zeros(11, dtype=torch.bool)
    assert torch.equal(source.moments(order, upright), images_to_pixels(IMAGES[order]))


def test_images_are_encoded_in_the_machines_precision(tmp_path, autoencoder):
    data, uncached = DatasetOptions(datadir=str(tmp_path)), LatentCacheOptions(no_latent_cache=True)
    machine = Machine(torch.device("cpu"), "bf16")
    found = open_moments(dataset(), autoencoder, data, uncached, machine).moments(INDICES, torch.zeros(4).bool())
    with machine.autocast():
        expected = autoencoder.encode(IMAGES[INDICES])
    assert torch.equal(found, expected)
    assert not torch.equal(found, autoencoder.encode(IMAGES[INDICES]))
