"""Precomputed latents: training uses the files' moments and never needs pixels."""

import gc
import shutil
import sys

import numpy as np
import pytest
import torch

from command_line import parse_options
from datasets_prep import build_latents
from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import open_moments
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import LOGVAR_RANGE, PretrainedAutoencoder
from options import UsageError
from runtime.distributed import Processes
from runtime.precision import Machine
from tests.plain_autoencoder import PlainAutoencoder

MACHINE = Machine(torch.device("cpu"), "fp32")
UPRIGHT = torch.zeros(3, dtype=torch.bool)
CHOSEN = torch.tensor([4, 0, 2])


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory):
    """An autoencoder for color images: factor 2, two latent channels."""
    folder = tmp_path_factory.mktemp("latents") / "ae"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(3, (8, 8), 2, 16, {}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def autoencoder(autoencoder_folder):
    return load_autoencoder(AutoencoderOptions(str(autoencoder_folder)), 3)


def arrays(count, channels=4, seed=0):
    return np.random.default_rng(seed).normal(size=(count, channels, 8, 8)).astype(np.float32)


def write_folder(root, values, suffix=".npy", classes=("a", "b")):
    """Write files 0, 1, ... to the classes in turn. Returns the values in reading order."""
    paths = []
    for index, value in enumerate(values):
        path = root / classes[index % len(classes)] / f"{index:03d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.save(file, value) if suffix == ".npy" else np.savez(file, value)
        paths.append(path)
    return np.stack([values[paths.index(path)] for path in sorted(paths)])


def open_split(datadir, split="train", size=16):
    return open_dataset(DatasetOptions("latent_imagenet_256", str(datadir), size), split)


def moments_of(dataset, autoencoder):
    return open_moments(dataset, autoencoder, DatasetOptions(), LatentCacheOptions(), MACHINE)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_moments_equal_the_files(tmp_path, autoencoder, suffix):
    stored = write_folder(tmp_path / "train", arrays(6), suffix)
    held_out = write_folder(tmp_path / "val", arrays(4, seed=1), suffix)
    train, validation = open_split(tmp_path), open_split(tmp_path, "validation").head(3)
    source, held_out_source = moments_of(train, autoencoder), moments_of(validation, autoencoder)
    np.testing.assert_array_equal(source.moments(CHOSEN, UPRIGHT).numpy(), stored[CHOSEN])
    np.testing.assert_array_equal(held_out_source.moments(torch.arange(3), UPRIGHT).numpy(), held_out[:3])
    assert (len(source), len(held_out_source)) == (6, 3)
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (train.facts.flips, train.facts.class_names) == (False, ("a", "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]  # no cache is written


def test_a_mean_alone_has_no_variance(tmp_path, autoencoder):
    stored = write_folder(tmp_path, arrays(8, channels=2))
    moments = moments_of(open_split(tmp_path), autoencoder).moments(torch.tensor([1]), torch.tensor([False]))
    np.testing.assert_array_equal(moments[0, :2].numpy(), stored[1])
    assert moments[0, 2:].unique().tolist() == [LOGVAR_RANGE[0]]
    noise = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(autoencoder.sample(moments, noise), autoencoder.sample(moments), atol=1e-5, rtol=0)


def test_a_leading_axis_of_one_is_dropped(tmp_path, autoencoder):
    write_folder(tmp_path, arrays(8)[:, None])
    assert moments_of(open_split(tmp_path), autoencoder).moments(CHOSEN, UPRIGHT).shape == (3, 4, 8, 8)


def test_threads_read_headers_one_at_a_time(tmp_path):
    """Python code such as the garbage collector may run while numpy parses a header, and must not let another thread parse."""
    stored = write_folder(tmp_path / "train", arrays(200))
    write_folder(tmp_path / "val", arrays(2))
    dataset = open_split(tmp_path)
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    callbacks = list(gc.callbacks)
    try:
        gc.callbacks.append(lambda phase, info: [None for _ in range(100)])
        sys.setswitchinterval(1e-6)
        gc.set_threshold(50)
        read = [dataset.stored(torch.arange(200), torch.zeros(200, dtype=torch.bool)) for _ in range(5)]
    finally:
        gc.callbacks[:] = callbacks
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
    for values in read:
        np.testing.assert_array_equal(values.numpy(), stored)


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_files_of_wrong_shape_or_type_are_refused(tmp_path, autoencoder, capsys):
    for values, message in (
        (arrays(4, channels=6), r"shape \(6, 8, 8\), .* need \(2, 8, 8\) \(mean\) or \(4, 8, 8\)"),
        ([np.zeros((4, 4, 4), np.float32)] * 4, r"shape \(4, 4, 4\)"),
        ([np.full((4, 8, 8), np.nan, np.float32)] * 4, "expected finite numbers"),
        ([np.zeros((4, 8), np.float32)] * 4, r"found \(4, 8\)"),
        ([np.array(Malicious(), dtype=object)] * 4, "cannot read the latent .*allow_pickle"),
    ):
        write_folder(tmp_path, values)
        with pytest.raises(UsageError, match=message):
            moments_of(open_split(tmp_path), autoencoder)
        shutil.rmtree(tmp_path / "a")
        shutil.rmtree(tmp_path / "b")
    with pytest.raises(UsageError, match=r"no latents in .*\.npy, \.npz"):
        open_split(tmp_path)
    write_folder(tmp_path, arrays(8))
    with pytest.raises(UsageError, match="holds latents, but --pretrained_autoencoder_ckpt none"):
        moments_of(open_split(tmp_path), PixelSpace(3))
    assert capsys.readouterr().out == ""


def test_latents_of_an_autoencoder_without_a_posterior(tmp_path):
    plain, values = PlainAutoencoder(3), arrays(8, channels=12)
    write_folder(tmp_path, values)
    source = moments_of(open_split(tmp_path), plain)
    moments = source.moments(torch.arange(2), torch.tensor([False, False]))
    assert moments.shape == (2, plain.moment_channels, 8, 8)
    assert plain.sample(moments).shape == (2, plain.latent_channels, 8, 8)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    write_folder(tmp_path, arrays(8, channels=24))
    with pytest.raises(UsageError, match=r"shape \(24, 8, 8\), .* need \(12, 8, 8\)$"):
        moments_of(open_split(tmp_path), plain)


def test_images_are_refused(tmp_path):
    write_folder(tmp_path, arrays(8))
    with pytest.raises(UsageError, match="holds latents but no images, which --eval_samples needs"):
        open_split(tmp_path).check_images("--eval_samples")
    with pytest.raises(UsageError, match="holds latents but no images"):
        open_split(tmp_path)[0]


def test_fingerprint_changes_with_the_files(tmp_path):
    write_folder(tmp_path, arrays(8))
    before = open_split(tmp_path).fingerprint
    write_folder(tmp_path, arrays(10))
    assert open_split(tmp_path).fingerprint != before


@pytest.fixture
def cached(tmp_path, photographs, autoencoder_folder):
    """Nine and two images in ImageNet's layout, and their latents written by the command."""
    for split, count in (("train", 9), ("val", 2)):
        for index in range(count):
            folder = tmp_path / "imagenet" / split / f"n0000000{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            photographs[index].save(folder / f"{index}.JPEG")
    flags = ["--dataset", "imagenet_256", "--datadir", tmp_path / "imagenet", "--image_size", 16, "--num_workers", 2]
    flags += ["--pretrained_autoencoder_ckpt", autoencoder_folder, "--latent_cache_dir", tmp_path / "latents"]
    flags = [*map(str, flags), "--precision", "fp32", "--device", "cpu"]
    build_latents.main(parse_options("", build_latents.GROUPS, flags), Processes())
    return tmp_path


def test_cached_latents_need_no_images(cached, autoencoder):
    images = {
        s: open_dataset(DatasetOptions("imagenet_256", str(cached / "imagenet"), 16), s)
        for s in ("train", "validation")
    }
    expected = autoencoder.encode(torch.stack([images["train"][int(index)] for index in CHOSEN]).flip(3))
    labels = {split: dataset.labels.tolist() for split, dataset in images.items()}
    shutil.rmtree(cached / "imagenet")
    for datadir in (cached / "latents", cached):
        if datadir == cached:
            (cached / "latents").rename(cached / "latent_cache")
        for split, known in labels.items():
            dataset = open_split(datadir, split)
            assert moments_of(dataset, autoencoder).labels.tolist() == known
        train = open_split(datadir)
        assert train.facts.flips
        found = moments_of(train, autoencoder).moments(CHOSEN, ~UPRIGHT)
        torch.testing.assert_close(found.float(), expected, rtol=2**-10, atol=1e-5)


def test_labels_are_stored_even_if_training_ignores_them(tmp_path, photographs, autoencoder):
    for index in range(25):
        folder = tmp_path / "data" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photographs[index % 24].save(folder / f"{index}.png")
    data = DatasetOptions("folder", str(tmp_path / "data"), 16)
    train = open_dataset(data, "train")
    expected = train.labels.tolist()
    assert 1 in expected
    train.labels.zero_()
    open_moments(train, autoencoder, data, LatentCacheOptions(latent_cache_dir=str(tmp_path / "cache")), MACHINE)
    assert open_split(tmp_path / "cache").labels.tolist() == expected


def test_caches_that_do_not_match_are_refused(cached, autoencoder):
    with pytest.raises(UsageError, match="one latent cache of the train images of size 32 .* but found none"):
        open_split(cached / "latents", size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other = PretrainedAutoencoder(new_autoencoder_kl(3, (8, 8), 2, 16, {}), "other")
    with pytest.raises(UsageError, match=f"from the autoencoder {autoencoder.sha256}, but .* {other.sha256}"):
        moments_of(open_split(cached / "latents"), other)
    train = next((cached / "latents").glob("*_train_*"))
    shutil.copytree(train, train.with_name("second_train"))
    with pytest.raises(UsageError, match="but found .*second_train"):
        open_split(cached / "latents")
    assert len(open_split(train)) == 9  # opened by the folder's name
    (train / "labels.npy").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"labels\.npy is damaged"):
        open_split(train)
