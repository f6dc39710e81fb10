"""LightningDiT's shards: the stored latents, their mirror images and their scale, which checkpoints record."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from datasets_prep.datasets import DatasetOptions, FlipOptions, choose_flips, open_dataset
from datasets_prep.latents import StoredMoments, scale_by_statistics
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pretrained import PretrainedAutoencoder
from options import UsageError
from tests.written_formats import write_lightningdit

COUNT = 20
LABELS = [row % 3 for row in range(COUNT)]
ROWS, UPRIGHT = torch.tensor([9, 0, 17, 7]), torch.zeros(4, dtype=torch.bool)


def normal(seed, channels=2):
    return torch.from_numpy(np.random.default_rng(seed).normal(3, 5, (COUNT, channels, 8, 8)).astype(np.float32))


LATENTS, MIRRORED = normal(0), normal(1)


def autoencoder(scale_factor=None, channels=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PretrainedAutoencoder(new_autoencoder_kl(3, (8, 8), channels, 16, {}), "ae", scale_factor)


def open_split(folder, split="train", name="folder"):
    return open_dataset(DatasetOptions(name, str(folder), 16), split)


@pytest.fixture
def folder(tmp_path):
    """Training shards, and held-out shards without statistics."""
    write_lightningdit(tmp_path / "train", LATENTS, LABELS, MIRRORED)
    write_lightningdit(tmp_path / "validation", MIRRORED, LABELS, LATENTS)
    (tmp_path / "validation" / "latents_stats.pt").unlink()
    return tmp_path


@pytest.mark.parametrize("name", ["folder", "latent_imagenet_256"])
def test_latents_of_both_orientations_equal_the_files(folder, name):
    train, held_out = open_split(folder, name=name), open_split(folder, "validation", name)
    assert (len(train), train.labels.tolist(), train.facts.flips, train.has_images) == (COUNT, LABELS, True, False)
    mirrored = torch.tensor([True, False, False, True])
    expected = torch.where(mirrored.view(-1, 1, 1, 1), MIRRORED[ROWS], LATENTS[ROWS])
    assert torch.equal(StoredMoments(train, autoencoder()).moments(ROWS, mirrored)[:, :2], expected)
    assert torch.equal(StoredMoments(held_out, autoencoder()).moments(ROWS, UPRIGHT)[:, :2], MIRRORED[ROWS])


@pytest.mark.parametrize("factor", [None, 0.18215])
def test_latents_are_scaled_by_their_statistics(folder, factor, capsys):
    train, network = open_split(folder), autoencoder(factor)
    scale_by_statistics(train, network)
    found = network.sample(StoredMoments(train, network).moments(torch.arange(COUNT), torch.zeros(COUNT).bool()))
    mean, std = LATENTS.mean((0, 2, 3), keepdim=True), LATENTS.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(found, (LATENTS - mean) / std * (factor or 1))
    assert found.std().item() == pytest.approx(factor or 1, rel=1e-3)
    again = autoencoder(factor)
    again.restore_scale(network.describe())  # what a checkpoint's header does
    torch.testing.assert_close(again.sample(train.stored(ROWS, UPRIGHT).repeat(1, 2, 1, 1)), found[ROWS])
    assert f"with the statistics in {folder / 'train' / 'latents_stats.pt'}" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [None, 0.18215])
def test_other_statistics_than_the_shards_are_refused(folder, factor):
    new_autoencoder_kl(3, (8, 8), 2, 16, {}).save_pretrained(folder / "ae")
    own = folder / "train" / "latents_stats.pt"

    def scale(given, factor):
        options = AutoencoderOptions(str(folder / "ae"), factor, given)
        network = load_autoencoder(options, 3)
        scale_by_statistics(open_split(folder), network, given)
        return network.describe()

    expected = scale("", factor)
    assert scale(str(own), factor) == expected
    torch.save({"mean": torch.full((2,), 7.0), "std": torch.full((2,), 9.0)}, folder / "mine.pt")
    with pytest.raises(
        UsageError, match=r"mine.pt \(mean 7 7 and .*\) contradicts .*train/latents_stats.pt.* \(mean [23]"
    ):
        scale(str(folder / "mine.pt"), factor)
    with pytest.raises(UsageError, match=r"--latent_statistics measured contradicts .*latents_stats.pt"):
        scale("measured", None)


def test_other_datasets_keep_the_autoencoders_scale(folder):
    network = autoencoder()
    before = network.describe()
    scale_by_statistics(open_split(folder).head(3), autoencoder())
    dataset = open_split(folder)
    dataset.statistics = None
    scale_by_statistics(dataset, network)
    assert network.describe() == before


def test_without_mirror_images_there_are_no_flips(tmp_path):
    write_lightningdit(tmp_path, LATENTS, LABELS)
    train = open_split(tmp_path)
    assert not train.facts.flips
    assert any("no mirror images" in text for text in train.survey.warnings)
    with pytest.raises(UsageError, match="--flip on"):
        choose_flips(train, FlipOptions("on"))


def test_wrong_files_are_named(tmp_path):
    def check(message, open_it=lambda: open_split(tmp_path)):
        with pytest.raises(UsageError, match=message):
            open_it()

    write_lightningdit(tmp_path, LATENTS, LABELS, MIRRORED)
    statistics = tmp_path / "latents_stats.pt"
    good = statistics.read_bytes()
    statistics.unlink()
    check(r"expected .*latents_stats\.pt with the latents' mean and std \[1, 2, 1, 1\], but there is none")
    for stored, message in (
        ({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, r"found \[\[1, 4, 1, 1\]"),
        ({"mean": torch.zeros(1, 2, 1, 1), "std": torch.zeros(1, 2, 1, 1)}, "a positive std"),
        ({"mean": torch.zeros(1, 2, 1, 1)}, r"found \[\[1, 2, 1, 1\]\]"),
    ):
        torch.save(stored, statistics)
        check(message)
    statistics.write_bytes(good)
    with pytest.raises(UsageError, match="statistics of 2 channels, but .* have 4"):
        scale_by_statistics(open_split(tmp_path), autoencoder(channels=4))
    shard = tmp_path / "latents_rank00_shard001.safetensors"
    labels = torch.tensor(LABELS[:6])
    for arrays, message in (
        ({"latents": LATENTS[:6]}, r"expected `latents` .* but found latents \[6, 2, 8, 8\]$"),
        ({"latents": LATENTS[:6], "labels": labels[:5]}, r"labels \[5\]"),
        ({"latents": LATENTS[:6], "labels": labels}, "shard001.* has latents .* but .*shard000"),
        ({"latents": LATENTS[:6].view(6, 8, 4, 4), "latents_flip": MIRRORED[:6].view(6, 8, 4, 4).half(), "labels": labels},
         r"\[6, 8, 4, 4\].* but .*shard000.* \[7, 2, 8, 8\]"),
        ({"latents": LATENTS[:6], "latents_flip": MIRRORED[:6], "labels": labels.float()}, "expected class ids"),
    ):  # fmt: skip
        save_file(arrays, shard)
        check(message)
    shard.write_bytes(shard.read_bytes()[:-100])
    check("cannot read the latents in .*shard001.*download or encode them again")
    save_file({"latents": LATENTS[:6] / 0, "latents_flip": MIRRORED[:6], "labels": labels}, shard)
    dataset = open_split(tmp_path)
    check("row 1 of .*shard001.* not finite", lambda: dataset.stored(torch.tensor([2, 8]), UPRIGHT[:2]))
