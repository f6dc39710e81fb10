import pytest
import torch

from datasets_prep.pairs import pair_cache
from datasets_prep.pairs.pair_cache import build_pair_cache, open_pairs, pair_identity
from models.autoencoders.protocol import AutoencoderFacts
from options import UsageError
from runtime.files import read_json

AUTOENCODER = AutoencoderFacts("ae", "abc", 2.0, (0.0,), (0.5,))
SHAPE, COUNT = (1, 2, 3), 7
LABELS = torch.arange(COUNT) % 3


def draw(indices):
    """Data and noise that hold their index, and minus it."""
    numbers = torch.tensor(indices, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, *SHAPE)
    return numbers, -numbers


def build(folder, draw=draw, **changes):
    teacher = {"seed": 3, "solver": {"method": "euler"}} | changes
    identity = pair_identity(teacher, AUTOENCODER, "fashion_mnist", 32, SHAPE, COUNT)
    build_pair_cache(folder, identity, LABELS, draw, "fp32")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pair_cache, "PAIRS_PER_SHARD", 3)


def test_pairs_are_read_by_index(tmp_path):
    build(tmp_path)
    pairs = open_pairs(tmp_path, AUTOENCODER, SHAPE, 3)
    assert len(pairs) == COUNT
    assert torch.equal(pairs.labels, LABELS)
    chosen = torch.tensor([6, 0, 3])
    data, noise = pairs.split(pairs.moments(chosen, torch.tensor([True, False, True])))
    assert data[:, 0, 0, 0].tolist() == [6, 0, 3]
    assert torch.equal(noise, -data)
    assert data.dtype == torch.float32
    assert open_pairs(tmp_path, AUTOENCODER, SHAPE, 1).labels.tolist() == [0] * COUNT


def test_an_interrupted_build_resumes_with_the_missing_shards(tmp_path):
    seen = []

    def interrupted(indices):
        if indices[0] == 3:
            raise KeyboardInterrupt
        return draw(indices)

    def recorded(indices):
        seen.append(list(indices))
        return draw(indices)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, interrupted)
    with pytest.raises(UsageError, match="is unfinished: repeat the command"):
        open_pairs(tmp_path, AUTOENCODER, SHAPE, 3)
    build(tmp_path, recorded)
    assert seen == [[3, 4, 5], [6]]
    build(tmp_path, recorded)
    assert len(seen) == 2
    assert len(read_json(tmp_path / "manifest.json")["shards"]) == 3


def test_the_fingerprint_changes_with_the_pairs(tmp_path):
    for name, factor in (("one", 1), ("again", 1), ("other", 2)):
        build(tmp_path / name, lambda indices, factor=factor: tuple(factor * each for each in draw(indices)))
    one, again, other = (open_pairs(tmp_path / name, AUTOENCODER, SHAPE, 3) for name in ("one", "again", "other"))
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_other_pairs_in_the_folder_are_refused(tmp_path):
    build(tmp_path)
    with pytest.raises(UsageError, match="holds other pairs: expected the teacher"):
        build(tmp_path, seed=4)


def test_samples_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(UsageError, match="float16 cannot hold for some of the pairs 0 to 2"):
        build(tmp_path, lambda indices: tuple(each * 1e6 + 1e6 for each in draw(indices)))


@pytest.mark.parametrize(
    ("autoencoder", "shape", "classes", "message"),
    [
        (
            AutoencoderFacts("other", "def", 2.0, (0.0,), (0.5,)),
            SHAPE,
            3,
            "of the autoencoder ae .* this run uses other",
        ),
        (AutoencoderFacts("ae", "abc", 4.0, (0.0,), (0.25,)), SHAPE, 3, "standard deviations .0.5.* with .0.25"),
        (AUTOENCODER, (1, 4, 4), 3, r"shape \(1, 2, 3\), but this run's have \(1, 4, 4\)"),
        (AUTOENCODER, SHAPE, 2, "samples of 3 classes, but the network has 2"),
        (AUTOENCODER, SHAPE, 4, "samples of 3 classes, but the network has 4: build the pairs with a checkpoint"),
    ],
)
def test_pairs_that_do_not_fit_the_run_are_refused(tmp_path, autoencoder, shape, classes, message):
    build(tmp_path)
    with pytest.raises(UsageError, match=message):
        open_pairs(tmp_path, autoencoder, shape, classes)


def test_folders_without_pairs_are_refused(tmp_path):
    with pytest.raises(UsageError, match="found no pairs; build them with python -m datasets_prep.build_pairs"):
        open_pairs(tmp_path / "missing", AUTOENCODER, SHAPE, 3)
    (tmp_path / "manifest.json").write_text('{"split": "train"}')
    with pytest.raises(UsageError, match="holds latents of images, but no pairs"):
        open_pairs(tmp_path, AUTOENCODER, SHAPE, 3)
