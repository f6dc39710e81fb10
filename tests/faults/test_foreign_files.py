"""Files that are not what their names say, and other projects' containers, are read by content or explained in one line.

Public reports: huggingface/diffusers#13559, safetensors/safetensors#414, antgroup/echomimic_v2#100,
nerfstudio-project/nerfstudio#3702, huggingface/diffusers#10928, Tencent-Hunyuan/Hunyuan3D-2#262, facebookresearch/DiT#83.
"""

import argparse
import gzip
import json
import shutil
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoints.files import describes_network, load_model, read_weights
from checkpoints.lfm_files import read_published, read_sampled
from checkpoints.projects.opening import open_published
from evaluation.features.weights import read_weights_file
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError
from runtime.torch_files import Unread, read_tensors, read_torch_file
from training.network import load_fitting_weights

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:657ae2afac259cc5\nsize 102979767\n"
STEM = "diffusion_pytorch_model"


def torch_bytes(path):
    torch.save(WEIGHTS, path)
    return path.read_bytes()


def safe_bytes(path):
    save_file(WEIGHTS, path)
    return path.read_bytes()


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pth", b"weights")
    return path.read_bytes()


WRONG = {
    "pointer": (lambda path: POINTER, r"Git LFS pointer.*git lfs pull"),
    "web page": (lambda path: b"\n<!DOCTYPE html>\n<html>Virus scan warning</html>", "web page.* download"),
    "nothing": (lambda path: b"", "it is empty: copy or download it again"),
    "gzip": (lambda path: gzip.compress(torch_bytes(path)), "archive: unpack it first"),
    "zip": (zipped, "archive: unpack it first"),
    "json": (lambda path: b'{"model_type": "dit"}', "JSON file"),
    "hdf5": (lambda path: b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "half a torch file": (
        lambda path: torch_bytes(path)[:300],
        "it is incomplete or damaged: copy or download it again",
    ),
    "half a safetensors file": (lambda path: safe_bytes(path)[:-3], "copy or download it again"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(
    "read", [read_weights, read_tensors, read_weights_file, load_model], ids=lambda read: read.__name__
)
def test_every_reader_says_what_a_wrong_file_is(read, kind, suffix, tmp_path):
    make, expected = WRONG[kind]
    content = make(tmp_path / "made")
    path = tmp_path / f"model_1{suffix}"
    path.write_bytes(content)
    bare = (
        read in (read_weights, load_model) and content[:2] == b"PK"
    )  # such files need flags, which read_published gets
    with pytest.raises(UsageError, match=f"model_1.*({'checkpoints.convert' if bare else expected})") as raised:
        read(str(path))
    assert "weights_only" not in str(raised.value)  # torch's advice is to trust the file
    if bare:
        with pytest.raises(UsageError, match=expected):
            read_published(path)


def test_a_folder_is_no_checkpoint(tmp_path):
    for read in (read_weights, read_tensors, read_weights_file):
        with pytest.raises(UsageError, match="it is a folder, but expected a file"):
            read(str(tmp_path))


@pytest.mark.parametrize("make", [torch_bytes, safe_bytes])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors", ".ckpt", ""])
def test_the_content_decides_and_not_the_suffix(make, suffix, tmp_path):
    path = tmp_path / f"model_1{suffix}"
    path.write_bytes(make(tmp_path / "made"))
    assert not describes_network(path)
    for found in (read_tensors(path), read_weights_file(str(path)), read_published(path).sampled):
        assert found.keys() == WEIGHTS.keys()
        assert all(torch.equal(found[name], value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize("zipfile_format", [True, False])
def test_scores_and_paths_next_to_the_weights_are_passed_over(zipfile_format, tmp_path):
    content = {
        "model": WEIGHTS,
        "best": np.float64(3.5),
        "losses": np.arange(3.0),
        "folder": PurePosixPath("/data"),
        "args": argparse.Namespace(data_path=Path("/data"), lr=np.float32(1e-4), epochs=3),
    }
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipfile_format)
    found = read_torch_file(tmp_path / "file.pt", allowed=(argparse.Namespace,))
    assert isinstance(found["best"], Unread)
    assert isinstance(found["folder"], Unread)
    assert found["args"].epochs == 3
    sampled = read_published(tmp_path / "file.pt").sampled
    assert all(torch.equal(sampled[name], value) for name, value in WEIGHTS.items())


def test_arguments_that_could_not_be_read_count_as_absent(tmp_path):
    arguments = argparse.Namespace(dataset="cifar10", datadir=Path("/data"), image_size=np.int64(32))
    torch.save({"model_dict": WEIGHTS, "args": arguments}, tmp_path / "content.pth")
    assert read_published(tmp_path / "content.pth").arguments == {"dataset": "cifar10"}


def test_a_pickled_network_is_refused_with_advice(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(
        UsageError, match=r"contains torch\.nn\.modules\.linear\.Linear; .* save its state_dict\(\) alone"
    ):
        read_torch_file(tmp_path / "model.pth")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network("DiT-Mi/4", 16, DiTOptions(num_in_channels=3, num_out_channels=3))


@pytest.mark.parametrize(
    "names",
    [("model", "ema"), ("state_dict", "state_dict_ema"), ("network", "ema_model"), ("online", "EMA-weights")],
)
def test_init_from_takes_the_ema_of_another_project(names, network, tmp_path, capsys):
    """The training states of SiT, REPA and LightningDiT, timm's, and others."""
    averages = network.state_dict()
    raw = {name: value + 1 for name, value in averages.items()}
    content = dict(zip(names, (raw, averages), strict=True))
    torch.save(
        content | {"opt": {"state": {}}, "args": argparse.Namespace(path_type="Linear")}, tmp_path / "0100000.pt"
    )
    found = read_sampled(tmp_path / "0100000.pt")
    assert all(torch.equal(found[name], value) for name, value in averages.items())
    assert f"the weights in its entry {names[1]} are used, not those in {names[0]}" in capsys.readouterr().err
    flags = {"dataset": "cifar10", "image_size": 16, "model_type": "DiT-Mi/4", "pretrained_autoencoder_ckpt": "none"}
    with pytest.raises(UsageError, match=r"another project's training state.*--init_from"):
        open_published(tmp_path / "0100000.pt", flags, "cpu")  # its times may run in the other direction


def test_an_ema_wrapper_s_names_are_read(network, tmp_path):
    """As ema-pytorch saves them, in one state dict with the raw weights."""
    own = network.state_dict()
    wrapped = {f"ema_model.{name}": value for name, value in own.items()}
    wrapped |= {f"online_model.{name}": value + 1 for name, value in own.items()}
    torch.save(wrapped, tmp_path / "model_1.pth")
    found = read_published(tmp_path / "model_1.pth").sampled
    assert all(torch.equal(found[name], value) for name, value in own.items())


def test_another_project_s_safetensors_file_is_read_like_a_pth(network, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() + 1 for name, value in network.state_dict().items()}, path, {"format": "pt"})
    assert not describes_network(path)
    target = build_network("DiT-Mi/4", 16, DiTOptions(num_in_channels=3, num_out_channels=3))
    load_fitting_weights(target, read_sampled(path))
    assert torch.equal(target.pos_embed, network.pos_embed + 1)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    new_autoencoder_kl(3, (8, 16), 2, 16, {}).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def as_torch_file(path):
    weights = read_tensors(path)
    path.unlink()
    torch.save(weights, path.with_suffix(".bin"))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.rename(path.with_name(f"{STEM}.fp16.safetensors")),
        lambda path: path.rename(path.with_name("vae-840000.safetensors")),
        as_torch_file,
    ],
    ids=["variant", "own name", "torch.save"],
)
def test_an_autoencoder_s_weights_are_found_under_other_names(change, folder, capsys):
    expected = load_autoencoder(AutoencoderOptions(str(folder)), 3).sha256
    assert "are read from" not in capsys.readouterr().err
    change(folder / f"{STEM}.safetensors")
    assert load_autoencoder(AutoencoderOptions(str(folder)), 3).sha256 == expected
    assert f"the weights of the autoencoder {folder} are read from" in capsys.readouterr().err


def test_the_full_weights_take_precedence_over_a_variant(folder):
    expected = load_autoencoder(AutoencoderOptions(str(folder)), 3).sha256
    shutil.copy(folder / f"{STEM}.safetensors", folder / f"{STEM}.fp16.safetensors")
    (folder / f"{STEM}.bin").write_bytes(b"other")
    assert load_autoencoder(AutoencoderOptions(str(folder)), 3).sha256 == expected


@pytest.mark.parametrize("kind", ["pointer", "nothing", "half a safetensors file"])
def test_an_autoencoder_s_damaged_weights_are_explained(kind, folder, tmp_path):
    make, expected = WRONG[kind]
    (folder / f"{STEM}.safetensors").write_bytes(make(tmp_path / "made"))
    with pytest.raises(UsageError, match=f"cannot load the autoencoder .*{STEM}.safetensors: .*{expected}"):
        load_autoencoder(AutoencoderOptions(str(folder)), 3)


@pytest.mark.parametrize(
    "entries",
    [{"scaling_factor": "0.13025"}, {"scaling_factor": [0.1]}, {"latents_mean": ["0", "0"], "latents_std": ["1", "1"]}],
)
def test_a_scale_that_is_no_number_is_refused(entries, folder):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="unusable latents_mean, latents_std or scaling_factor"):
        load_autoencoder(AutoencoderOptions(str(folder)), 3)
