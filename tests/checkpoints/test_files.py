"""A checkpoint is whole, its own description, and never executed."""

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.experiments import find_checkpoint, newest_model
from checkpoints.files import load_model, read_weights, save_weights
from models.autoencoders.kl import KLAutoencoder, new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pixels import PixelSpace
from models.conditions import Condition
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError
from runtime.torch_files import load_content, save_content

WEIGHTS = {
    "a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "b.half": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.float16),
    "c": torch.arange(6).view(2, 3).t(),  # not contiguous
    "d": torch.tensor(7),
}
HEADER = {"model_type": "x", "step": 12, "network": {"sizes": (1, 2), "scale": 0.1, "name": "ä", "none": None}}
OPTIONS = DiTOptions(num_in_channels=2, num_out_channels=2, num_classes=3, label_dropout=0.1)


@dataclass(frozen=True)
class Facts:
    name: str = "tiny"
    channels: int = 1


def save_tiny_autoencoder(folder, seed=0, **statistics):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = new_autoencoder_kl(1, (8, 8), 2, 8, statistics)
    network.save_pretrained(folder)
    return AutoencoderOptions(str(folder))


def save_model(path, autoencoder):
    """A network with random weights throughout, saved as training does; returns it."""
    network = build_network("DiT-Mi/2", 4, OPTIONS).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05)
    header = {
        "model_type": "DiT-Mi/2",
        "network": OPTIONS,
        "latent_size": 4,
        "autoencoder": autoencoder.describe(),
        "dataset": Facts(),
    }
    save_weights(path, network.state_dict(), header)
    return network


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model_1.safetensors"
    save_weights(path, WEIGHTS, HEADER)
    return path


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_weights_and_header_come_back_bit_for_bit(file):
    weights, header = read_weights(file)
    assert weights.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert weights[name].dtype == value.dtype
        assert weights[name].shape == value.shape
        assert bits(weights[name]) == bits(value)
    assert {name: header[name] for name in HEADER} == json.loads(json.dumps(HEADER))
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


def test_scale_factor_of_training_is_that_of_sampling(tmp_path):
    source = save_tiny_autoencoder(tmp_path / "ae", latents_mean=[0.5, -1.0], latents_std=[2.0, 0.25])
    save_model(tmp_path / "m", load_autoencoder(AutoencoderOptions(source.pretrained_autoencoder_ckpt, 0.5), 1))
    for model in (load_model(tmp_path / "m"), load_model(tmp_path / "m", autoencoder=source)):
        assert model.autoencoder.std.flatten().tolist() == [2.0, 2.0]
        assert model.autoencoder.mean.flatten().tolist() == [0.0, 0.0]


def test_scale_of_training_outlives_a_change_of_the_autoencoders_configuration(tmp_path):
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
    header = {"network": options, "latent_size": 8, "autoencoder": PixelSpace(1).describe(), "dataset": Facts()}
    save_weights(tmp_path / "m", network.state_dict(), {"model_type": "DiT-Mi/4", **header})
    model = load_model(tmp_path / "m")
    assert isinstance(model.autoencoder, PixelSpace)
    assert model.autoencoder.latent_channels == 1


def test_moved_autoencoder_is_named_and_another_one_refused(tmp_path):
    save_model(tmp_path / "m", load_autoencoder(save_tiny_autoencoder(tmp_path / "ae"), 1))
    (tmp_path / "ae").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=f"{tmp_path}/ae"):
        load_model(tmp_path / "m")
    moved = AutoencoderOptions(str(tmp_path / "moved"))
    assert isinstance(load_model(tmp_path / "m", autoencoder=moved).autoencoder, KLAutoencoder)
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
    start = 8 + int.from_bytes(data[:8], "little")  # of the weights
    for position in [0, 9, start, start + 17, len(data) - 1]:
        damaged = bytearray(data)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"model_1\.safetensors"):
            read_weights(file)


@pytest.mark.parametrize("metadata", [None, {"header": "[]"}, {"header": '{"format": "latent-flow-0"}'}, {"a": "b"}])
def test_foreign_safetensors_file_is_refused(tmp_path, metadata):
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors", metadata=metadata)
    with pytest.raises(UsageError, match=r"foreign\.safetensors is no checkpoint of this project"):
        read_weights(tmp_path / "foreign.safetensors")


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the checkpoint .*absent\.safetensors"):
        read_weights(tmp_path / "absent.safetensors")


def test_newest_model_is_that_of_the_largest_number(tmp_path):
    for name in ["model_9", "model_10", "model_100", "best", "model_200.tmp-3", "model_x", "old_model_300"]:
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "model_400.safetensors.tmp-12").touch()
    assert newest_model(tmp_path).name == "model_100.safetensors"
    assert newest_model(tmp_path, 9).name == "model_9.safetensors"
    with pytest.raises(
        UsageError,
        match=r"no model_11\.safetensors or model_11\.pth in .*has: model_10\.safe.*model_9\.saf.*--checkpoint",
    ):
        newest_model(tmp_path, 11)


def test_published_checkpoints_are_found_and_ours_come_first(tmp_path):
    for name in ["model_475.pth", "model_450.pth", "model_450.safetensors", "cond_stage_model_500.pth", "content.pth"]:
        (tmp_path / name).touch()
    assert newest_model(tmp_path).name == "model_475.pth"
    assert newest_model(tmp_path, 450).name == "model_450.safetensors"
    with pytest.raises(UsageError, match=r"no model_500\.safetensors or model_500\.pth in .*model_475\.pth"):
        newest_model(tmp_path, 500)


def test_a_name_alone_is_also_looked_for_in_the_experiment(tmp_path):
    (tmp_path / "model_1.pth").touch()
    assert find_checkpoint("model_1.pth", tmp_path) == tmp_path / "model_1.pth"
    assert find_checkpoint(str(tmp_path / "model_1.pth"), tmp_path / "x") == tmp_path / "model_1.pth"
    assert find_checkpoint("absent.pth", tmp_path) == Path("absent.pth")


def test_a_file_of_torch_save_is_no_checkpoint_of_ours(tmp_path):
    torch.save(WEIGHTS, tmp_path / "model_1.pth")
    with pytest.raises(UsageError, match=r"model_1\.pth is a file of torch\.save.*python -m models\.convert"):
        read_weights(tmp_path / "model_1.pth")


def test_run_without_checkpoints_says_what_to_do(tmp_path):
    for folder, found in ((tmp_path, "it has: no checkpoints"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(
            UsageError,
            match=rf"no model_<epoch>\.safetensors or model_<epoch>\.pth in {folder} .*{found}.*run\.sh",
        ):
            newest_model(folder)


def test_a_full_disk_is_an_os_error_and_costs_nothing(tmp_path):
    """exit_cleanly turns it into one line; libraries that write to paths hide it in errors of their own."""
    weights, content = tmp_path / "model_1.safetensors", tmp_path / "content.pth"
    for path, save in [
        (weights, lambda p: save_weights(p, WEIGHTS, HEADER)),
        (content, lambda p: save_content(p, WEIGHTS)),
    ]:
        save(path)
        before = path.read_bytes()
        path.with_name(f"{path.name}.tmp-{os.getpid()}").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device"):
            save(path)
        assert path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["content.pth", "model_1.safetensors"]


def test_checkpoints_have_the_permissions_of_any_new_file(file):
    (file.parent / "ordinary").touch()
    assert file.stat().st_mode == (file.parent / "ordinary").stat().st_mode


CONTENT = {
    "step": 3,
    "seconds": 0.1,
    "best": float("inf"),
    "network": WEIGHTS,
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
}


def test_content_comes_back_bit_for_bit(tmp_path):
    save_content(tmp_path / "content.pth", CONTENT)
    found = load_content(tmp_path / "content.pth")
    assert {name: found[name] for name in ("step", "seconds", "best")} == {
        "step": 3,
        "seconds": 0.1,
        "best": float("inf"),
    }
    assert found["optimizer"]["param_groups"] == CONTENT["optimizer"]["param_groups"]
    for name, value in WEIGHTS.items():
        assert bits(found["network"][name]) == bits(value)


def test_damaged_content_is_named(tmp_path):
    path = tmp_path / "content.pth"
    save_content(path, {"weights": torch.full((1000,), 0.5)})
    data = path.read_bytes()
    inside = data.index(torch.full((8,), 0.5).numpy().tobytes()) + 100  # of the numbers: only a checksum can tell
    flipped = bytearray(data)
    flipped[inside] ^= 1
    for damaged in (b"", data[:100], data[: len(data) // 2], data[:-1], b"no checkpoint", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"cannot read .*content\.pth: \S"):
            load_content(path)
    with pytest.raises(UsageError, match=r"cannot read .*absent\.pth"):
        load_content(tmp_path / "absent.pth")


class Trap:
    """Unpickled without care, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_with_code_is_refused_and_never_executed(tmp_path, save):
    marker, path = tmp_path / "executed", tmp_path / "content.pth"
    save({"step": 1, "network": Trap(marker)}, path)
    with pytest.raises(UsageError, match=r"cannot read .*content\.pth"):
        load_content(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert marker.exists()  # the trap works
