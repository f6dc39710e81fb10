"""Checkpoints are complete and self-describing, and never run code when loaded."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.files import load_model, read_weights, save_weights
from datasets_prep.image_dataset import DatasetFacts
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.conditions import Condition
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError
from runtime.weights import weights_hash
from tests.headers import header_of

WEIGHTS = {
    "a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "b.half": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.float16),
    "c": torch.arange(6).view(2, 3).t(),  # not contiguous
    "d": torch.tensor(7),
}
OPTIONS = DiTOptions(num_in_channels=2, num_out_channels=2, num_classes=3, label_dropout=0.1)
HEADER = header_of(OPTIONS, step=12, training={"sizes": [1, 2], "scale": 0.1, "name": "ä", "none": None})


def save_tiny_autoencoder(folder, seed=0, **statistics):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = new_autoencoder_kl(1, (8, 8), 2, 8, statistics)
    network.save_pretrained(folder)
    return AutoencoderOptions(str(folder))


def save_model(path, autoencoder):
    """Save a network with random weights the way training does, and return it."""
    network = build_network("DiT-Mi/2", 4, OPTIONS).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05)
    facts = DatasetFacts("tiny", 8, 1, None, False, ())
    save_weights(path, network.state_dict(), header_of(OPTIONS, autoencoder=autoencoder.describe(), dataset=facts))
    return network


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model_1.safetensors"
    save_weights(path, WEIGHTS, HEADER)
    return path


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_weights_and_header_round_trip_bit_for_bit(file):
    weights, header = read_weights(file)
    assert weights.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert weights[name].dtype == value.dtype
        assert weights[name].shape == value.shape
        assert bits(weights[name]) == bits(value)
    assert header == replace(HEADER, weights_sha256=weights_hash(WEIGHTS))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_saving_twice_gives_the_same_bytes(file, tmp_path):
    save_weights(tmp_path / "again", WEIGHTS, HEADER)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_network_is_rebuilt_from_the_file_alone(tmp_path):
    statistics = {"latents_mean": [0.5, -1.0], "latents_std": [2.0, 0.25]}
    autoencoder = load_autoencoder(save_tiny_autoencoder(tmp_path / "ae", **statistics), 1)
    network = save_model(tmp_path / "model.safetensors", autoencoder)
    model = load_model(tmp_path / "model.safetensors")
    t, x = torch.tensor([0.2, 0.9]), torch.randn(2, 2, 4, 4)
    condition = Condition(torch.tensor([1, 3]))
    with torch.no_grad():
        assert torch.equal(model.network(t, x, condition), network(t, x, condition))
    assert network(t, x, condition).std() > 0.01
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert torch.equal(model.autoencoder.decode(x), autoencoder.decode(x))
    assert model.autoencoder.describe() == autoencoder.describe()


def test_sampling_uses_the_scale_factor_of_training(tmp_path):
    source = save_tiny_autoencoder(tmp_path / "ae", latents_mean=[0.5, -1.0], latents_std=[2.0, 0.25])
    save_model(tmp_path / "m", load_autoencoder(AutoencoderOptions(source.pretrained_autoencoder_ckpt, 0.5), 1))
    for model in (load_model(tmp_path / "m"), load_model(tmp_path / "m", autoencoder=source)):
        assert model.autoencoder.std.flatten().tolist() == [2.0, 2.0]
        assert model.autoencoder.mean.flatten().tolist() == [0.0, 0.0]


def test_stored_scale_overrides_a_changed_autoencoder_configuration(tmp_path):
    source = save_tiny_autoencoder(tmp_path / "ae", latents_mean=[0.5, -1.0], latents_std=[2.0, 0.3])
    trained = load_autoencoder(source, 1)
    save_model(tmp_path / "m", trained)
    config = tmp_path / "ae" / "config.json"
    config.write_text(config.read_text().replace("0.3", "0.7"))
    assert load_autoencoder(source, 1).describe() != trained.describe()
    assert load_model(tmp_path / "m").autoencoder.describe() == trained.describe()


def test_pixel_space_model(tmp_path):
    options = DiTOptions(num_in_channels=1, num_out_channels=1)
    network = build_network("DiT-Mi/4", 8, options)
    header = header_of(options, "DiT-Mi/4", 8, autoencoder=PixelSpace(1).describe())
    save_weights(tmp_path / "m", network.state_dict(), header)
    model = load_model(tmp_path / "m")
    assert isinstance(model.autoencoder, PixelSpace)
    assert model.autoencoder.latent_channels == 1


def test_a_moved_autoencoder_is_named_and_a_different_one_refused(tmp_path):
    save_model(tmp_path / "m", load_autoencoder(save_tiny_autoencoder(tmp_path / "ae"), 1))
    (tmp_path / "ae").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=f"{tmp_path}/ae"):
        load_model(tmp_path / "m")
    moved = AutoencoderOptions(str(tmp_path / "moved"))
    assert isinstance(load_model(tmp_path / "m", autoencoder=moved).autoencoder, PretrainedAutoencoder)
    other = save_tiny_autoencoder(tmp_path / "other", seed=1)
    hashes = [load_autoencoder(source, 1).sha256[:12] for source in (moved, other)]
    with pytest.raises(UsageError, match=rf"{tmp_path}/ae .*{hashes[0]}.*{tmp_path}/other .*{hashes[1]}"):
        load_model(tmp_path / "m", autoencoder=other)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.999])
def test_truncated_file_is_named(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UsageError, match=r"cannot read the checkpoint .*model_1\.safetensors"):
        read_weights(file)


def test_a_flipped_byte_anywhere_is_found(file):
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")  # start of the weights
    for position in [0, 9, start, start + 17, len(data) - 1]:
        damaged = bytearray(data)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"model_1\.safetensors"):
            read_weights(file)


@pytest.mark.parametrize("metadata", [None, {"header": "[]"}, {"header": '{"format": "latent-flow-0"}'}, {"a": "b"}])
def test_foreign_safetensors_file_is_refused(tmp_path, metadata):
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors", metadata=metadata)
    with pytest.raises(UsageError, match=r"foreign\.safetensors is not a checkpoint of this project"):
        read_weights(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"colour": 1}, "colour"),
        ({"model_type": "of tomorrow"}, "unknown network 'of tomorrow': expected one of .*DiT-B/2.*import"),
    ],
)
def test_a_header_that_this_version_does_not_read_is_refused_with_the_file_s_name(file, changes, reason):
    stored = replace(HEADER, weights_sha256=weights_hash(WEIGHTS)).to_json() | changes
    weights = {name: value.contiguous() for name, value in WEIGHTS.items()}
    save_file(weights, file, metadata={"header": json.dumps(stored)})
    with pytest.raises(UsageError, match=rf"cannot read the checkpoint .*model_1\.safetensors: .*{reason}"):
        read_weights(file)


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the checkpoint .*absent\.safetensors"):
        read_weights(tmp_path / "absent.safetensors")


def test_a_file_written_by_torch_save_is_not_our_checkpoint(tmp_path):
    torch.save(WEIGHTS, tmp_path / "model_1.pth")
    with pytest.raises(UsageError, match=r"model_1\.pth is a torch\.save file.*python -m checkpoints\.convert"):
        read_weights(tmp_path / "model_1.pth")


def test_a_full_disk_raises_os_error_and_keeps_the_old_file(file):
    """`exit_cleanly` prints OSError as one line. Libraries that write to paths raise other error types for a full disk."""
    before = file.read_bytes()
    file.with_name(f"{file.name}.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save_weights(file, WEIGHTS, HEADER)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_checkpoints_have_default_permissions(file):
    (file.parent / "ordinary").touch()
    assert file.stat().st_mode == (file.parent / "ordinary").stat().st_mode


def test_tied_weights_are_saved_under_both_names(tmp_path):
    shared = torch.arange(6.0)
    weights = {"a": shared, "b": shared, "c": shared.view(2, 3).t(), "d": shared[3:]}
    save_weights(tmp_path / "model_1.safetensors", weights, HEADER)
    found = read_weights(tmp_path / "model_1.safetensors")[0]
    assert all(torch.equal(found[name], value) for name, value in weights.items())
