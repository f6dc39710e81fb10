"""Every image is encoded once, with the same result as encoding it directly. Shards can be resumed and are verified."""

import json
import threading

import numpy as np
import pytest
import torch

from datasets_prep import cached_moments, latent_cache
from datasets_prep.datasets import DatasetFacts, ImageDataset
from datasets_prep.latent_cache import build_latent_cache, cache_folder, open_latent_cache
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import decode_images
from models.autoencoders.pretrained import PretrainedAutoencoder
from options import UsageError
from runtime.distributed import Processes
from runtime.precision import Machine
from tests.plain_autoencoder import PlainAutoencoder

MACHINE = Machine(torch.device("cpu"), "fp32")
COUNT, SHARD = (
    23,
    5,
)  # Images, and images per shard if they are not mirrored. This gives shards of 5, 5, 5, 5 and 3 images.


def tiny_autoencoder(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PretrainedAutoencoder(new_autoencoder_kl(1, (8, 8), 2, 8, {}), f"tiny-{seed}")


def tiny_dataset(flips=False, count=COUNT, image_size=8, fingerprint="f"):
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 1, image_size, image_size), generator=generator, dtype=torch.uint8)
    facts = DatasetFacts("tiny", image_size, 1, None, flips, ("a", "b"))
    return ImageDataset(facts, "train", np.arange(count) % 2, images.__getitem__, fingerprint)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Use shards of 5 images of 8 x 8 pixels with moments of 4 x 4 x 4, encoded in batches of 2."""
    monkeypatch.setattr(latent_cache, "SHARD_BYTES", SHARD * 4 * 4 * 4 * 2)
    monkeypatch.setattr(latent_cache, "PIXELS_PER_BATCH", 2 * 8 * 8)


@pytest.fixture(scope="module")
def autoencoder():
    return tiny_autoencoder()


def build(folder, dataset, autoencoder, **settings):
    build_latent_cache(folder, dataset, autoencoder, MACHINE, **settings)
    return open_latent_cache(folder, dataset, autoencoder)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_images(dataset):
    return torch.stack([dataset[i] for i in range(len(dataset))])


def stop_after(monkeypatch, images):
    """Interrupt the encoder after `images` images. Returns the batches that it encoded."""
    seen = []
    encode = PretrainedAutoencoder.encode

    def limited(self, batch):
        if sum(seen) >= images:
            raise KeyboardInterrupt
        seen.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(PretrainedAutoencoder, "encode", limited)
    return seen


def test_the_cache_equals_direct_encoding_in_half_precision(tmp_path, autoencoder):
    dataset = tiny_dataset()
    cache = build(tmp_path / "cache", dataset, autoencoder)
    direct = autoencoder.encode(all_images(dataset))
    indices = torch.tensor([22, 0, 7, 7, 4, 5, 19])  # from every shard, in arbitrary order
    found = cache.moments(indices, torch.zeros(7, dtype=torch.bool))
    assert found.dtype == torch.float16
    # The tolerance is one unit in the last place of float16, since rounding depends on the batches.
    torch.testing.assert_close(found.float(), direct[indices], rtol=2**-10, atol=1e-5)
    assert len(cache) == COUNT
    assert torch.equal(cache.labels, dataset.labels)
    assert len(list((tmp_path / "cache").glob("moments_*.npy"))) == 5


def test_reading_works_without_posix_fadvise(tmp_path, autoencoder, monkeypatch):
    dataset = tiny_dataset(flips=True)
    wanted = torch.tensor([22, 0, 7, 7, 4]), torch.tensor([True, False, True, False, True])
    advised = build(tmp_path / "cache", dataset, autoencoder).moments(*wanted)
    monkeypatch.setattr(cached_moments, "ADVISABLE", False)
    assert torch.equal(open_latent_cache(tmp_path / "cache", dataset, autoencoder).moments(*wanted), advised)


def test_both_orientations_are_cached_if_the_dataset_flips(tmp_path, autoencoder):
    dataset = tiny_dataset(flips=True)
    cache = build(tmp_path / "cache", dataset, autoencoder)
    images = all_images(dataset)
    upright, mirrored = autoencoder.encode(images), autoencoder.encode(images.flip(3))
    assert (mirrored - upright.flip(3)).abs().max() > 0.01  # mirroring the moments would not be enough
    turned = torch.arange(COUNT) % 3 == 0
    expected = torch.where(turned.view(-1, 1, 1, 1), mirrored, upright)
    torch.testing.assert_close(cache.moments(torch.arange(COUNT), turned).float(), expected, rtol=2**-10, atol=1e-5)


def test_caches_of_earlier_versions_are_opened_and_completed(tmp_path, autoencoder, monkeypatch):
    """Their manifests and shard entries also stored sums and statistics of the latents."""
    folder, dataset = tmp_path / "cache", tiny_dataset()
    build(tmp_path / "whole", dataset, autoencoder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 11)
        build(folder, dataset, autoencoder)
    entries = sorted(folder.glob("moments_*.json"))
    for entry in entries:
        add_keys(entry, count=SHARD * 16, sum=[0.5, -0.5], sum_of_squares=[3.0, 4.0])
    build(folder, dataset, autoencoder)  # begun by an earlier version, completed by this one
    assert (folder / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    add_keys(folder / "manifest.json", statistics={"mean": [0.1, 0.2], "std": [1.0, 2.0]})
    before = files_of(folder)
    cache = build(folder, dataset, autoencoder)  # finished by an earlier version
    assert len(entries) == 2
    assert files_of(folder) == before
    everything = torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    expected = open_latent_cache(tmp_path / "whole", dataset, autoencoder).moments(*everything)
    assert torch.equal(cache.moments(*everything), expected)


def add_keys(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("images", [1, 6, 15, 22])
def test_an_interrupted_build_encodes_nothing_twice(tmp_path, autoencoder, monkeypatch, images):
    dataset = tiny_dataset()
    build(tmp_path / "whole", dataset, autoencoder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        seen = stop_after(patch, images)
        build(tmp_path / "cache", dataset, autoencoder)
    with pytest.raises(UsageError, match="is unfinished: restart training to complete it"):
        open_latent_cache(tmp_path / "cache", dataset, autoencoder)
    finished = sum(seen) // SHARD * SHARD
    with monkeypatch.context() as patch:
        seen = stop_after(patch, COUNT)
        build(tmp_path / "cache", dataset, autoencoder)
    assert sum(seen) == COUNT - finished
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


def test_a_finished_cache_is_not_rebuilt(tmp_path, autoencoder, monkeypatch):
    dataset = tiny_dataset()
    build(tmp_path / "cache", dataset, autoencoder)
    before = files_of(tmp_path / "cache")
    stop_after(monkeypatch, 0)
    build(tmp_path / "cache", dataset, autoencoder)
    assert files_of(tmp_path / "cache") == before


def test_a_cache_that_another_run_is_building_is_waited_for(tmp_path, autoencoder, monkeypatch, capsys):
    dataset = tiny_dataset()
    build(tmp_path / "whole", dataset, autoencoder)
    (tmp_path / "cache").mkdir()
    lock = tmp_path / "cache" / "build.lock"
    lock.write_text('{"host": "elsewhere", "pid": 7, "identity": "", "since": "yesterday"}')

    def nap(seconds):  # the other run finishes during the wait
        for name, data in files_of(tmp_path / "whole").items():
            (tmp_path / "cache" / name).write_bytes(data)
        lock.unlink()

    monkeypatch.setattr("runtime.locks.time.sleep", nap)
    stop_after(monkeypatch, 0)
    build(tmp_path / "cache", dataset, autoencoder)
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")
    out = capsys.readouterr().out
    assert "waiting: process 7 on elsewhere, since yesterday, is building this latent cache" in out
    assert f"if it has ended, delete {lock}" in out


def test_processes_share_the_shards(tmp_path, autoencoder, monkeypatch):
    dataset = tiny_dataset()
    build(tmp_path / "alone", dataset, autoencoder)
    folder = tmp_path / "shared"
    monkeypatch.setattr(Processes, "any", lambda self, flag: flag)
    with pytest.raises(UsageError, match="moments_00001"):  # too early: the second process's shards are missing
        build_latent_cache(folder, dataset, autoencoder, MACHINE, Processes(0, 2))
    assert [path.name for path in sorted(folder.glob("*.npy"))] == [f"moments_0000{i}.npy" for i in (0, 2, 4)]
    build_latent_cache(folder, dataset, autoencoder, MACHINE, Processes(1, 2))
    build_latent_cache(folder, dataset, autoencoder, MACHINE, Processes(0, 2))
    assert files_of(folder) == files_of(tmp_path / "alone")


@pytest.mark.parametrize(
    ("change", "key", "values"),
    [
        ({"image_size": 16}, "image_size", ("8", "16")),
        ({"count": 24}, "count", ("23", "24")),
        ({"fingerprint": "g"}, "dataset_fingerprint", ("f", "g")),
        ({"flips": True}, "orientations", ("1", "2")),
    ],
)
def test_cache_of_other_data_is_refused_with_both_values(tmp_path, autoencoder, change, key, values):
    folder = tmp_path / "cache"
    build(folder, tiny_dataset(), autoencoder)
    message = f"built for another {key}: expected {values[1]}, but found {values[0]}"
    for use in (open_latent_cache, lambda *arguments: build_latent_cache(*arguments, MACHINE)):
        with pytest.raises(UsageError, match=message):
            use(folder, tiny_dataset(**change), autoencoder)


def test_a_cache_of_another_autoencoder_is_refused_with_both_hashes(tmp_path, autoencoder):
    folder, other = tmp_path / "cache", tiny_autoencoder(seed=1)
    build(folder, tiny_dataset(), autoencoder)
    before = files_of(folder)
    with pytest.raises(UsageError, match=f"autoencoder_sha256: expected {other.sha256}, .* {autoencoder.sha256}"):
        build(folder, tiny_dataset(), other)
    assert files_of(folder) == before
    assert cache_folder(tmp_path, tiny_dataset(), autoencoder) != cache_folder(tmp_path, tiny_dataset(), other)


@pytest.mark.parametrize("position", [0, 200, -1])
def test_a_flipped_byte_in_a_shard_is_found_and_named(tmp_path, autoencoder, position):
    folder, dataset = tmp_path / "cache", tiny_dataset()
    build(folder, dataset, autoencoder)
    data = bytearray((folder / "moments_00003.npy").read_bytes())
    data[position] ^= 1
    (folder / "moments_00003.npy").write_bytes(data)
    with pytest.raises(UsageError, match=r"moments_00003\.npy is damaged"):
        open_latent_cache(folder, dataset, autoencoder)


def test_a_missing_shard_is_named(tmp_path, autoencoder):
    folder, dataset = tmp_path / "cache", tiny_dataset()
    build(folder, dataset, autoencoder)
    (folder / "moments_00001.npy").unlink()
    with pytest.raises(UsageError, match=r"moments_00001\.npy"):
        open_latent_cache(folder, dataset, autoencoder)


def test_the_precision_is_recorded_and_any_precision_is_accepted(tmp_path, autoencoder, monkeypatch):
    folder, dataset, bf16 = tmp_path / "cache", tiny_dataset(), Machine(torch.device("cpu"), "bf16")
    everything = torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    build_latent_cache(folder, dataset, autoencoder, bf16)
    before = files_of(folder)
    cache = build(folder, dataset, autoencoder)  # a run in float32 uses the bfloat16 cache
    assert files_of(folder) == before
    assert noted_precision(folder) == "bf16"
    with bf16.autocast():
        direct = autoencoder.encode(all_images(dataset))
    found = cache.moments(*everything).float()
    # The tolerance is bfloat16's precision, since rounding depends on the batches.
    torch.testing.assert_close(found, direct, rtol=2**-6, atol=2**-7)
    assert not torch.equal(found, build(tmp_path / "fp32", dataset, autoencoder).moments(*everything).float())
    assert noted_precision(tmp_path / "fp32") == "fp32"


def test_a_cache_built_in_two_precisions_records_both(tmp_path, autoencoder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 6)
        build_latent_cache(tmp_path / "cache", tiny_dataset(), autoencoder, Machine(torch.device("cpu"), "bf16"))
    build(tmp_path / "cache", tiny_dataset(), autoencoder)
    assert noted_precision(tmp_path / "cache") == "bf16 and fp32"


def noted_precision(folder):
    return json.loads((folder / "manifest.json").read_text())["precision"]


def test_the_next_batch_is_read_during_encoding(tmp_path, autoencoder, monkeypatch):
    dataset, encode, ahead = tiny_dataset(count=SHARD), PretrainedAutoencoder.encode, []
    read = [threading.Event() for _ in range(SHARD)]

    def noted(index):
        read[index].set()
        return dataset[index]

    def waiting(self, batch):
        following = 2 * (len(ahead) + 1)  # batches of 2
        ahead.append(following >= SHARD or read[following].wait(60))
        return encode(self, batch)

    monkeypatch.setattr(PretrainedAutoencoder, "encode", waiting)
    watched = ImageDataset(dataset.facts, "train", dataset.stored_labels, noted, "f")
    build(tmp_path / "cache", watched, autoencoder)
    assert ahead == [True, True, True]


def test_values_beyond_float16_are_never_cached(tmp_path, autoencoder, monkeypatch):
    encode = PretrainedAutoencoder.encode
    monkeypatch.setattr(PretrainedAutoencoder, "encode", lambda self, batch: encode(self, batch) + 1e6)
    with pytest.raises(UsageError, match=r"float16 cannot hold for some of the images 0 to \d+ \(in fp32\)"):
        build(tmp_path / "cache", tiny_dataset(), autoencoder)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_latents_without_a_posterior_are_cached_unchanged(tmp_path):
    dataset, plain = tiny_dataset(flips=True), PlainAutoencoder(1)
    cache = build(tmp_path / "cache", dataset, plain)
    indices, mirrored = torch.arange(COUNT), torch.arange(COUNT) % 2 == 1
    images = torch.where(mirrored.view(-1, 1, 1, 1), all_images(dataset).flip(3), all_images(dataset))
    found = plain.sample(cache.moments(indices, mirrored))
    assert found.shape == (COUNT, 4, 4, 4)
    assert torch.equal(decode_images(plain, found)[0], images)


def test_an_autoencoder_without_a_hash_is_not_cached(tmp_path):
    """Otherwise, two such autoencoders would read each other's latents."""
    with pytest.raises(UsageError, match="plain has no hash.*--no_latent_cache"):
        build(tmp_path / "cache", tiny_dataset(), PlainAutoencoder(1, sha256=None))
