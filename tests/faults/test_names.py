"""Names cannot point outside their folders, ids are not confused with paths, and changed downloads or data are detected."""

import gzip
import hashlib
import json
import os
import shutil
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import diffusers
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets import CIFAR10

from checkpoints.experiments import newest_model
from checkpoints.files import read_weights
from datasets_prep import cifar10, idx
from datasets_prep.datasets import DatasetOptions, open_dataset
from evaluation import pairs as paired
from evaluation.features import inception, weights
from models.autoencoders import diffusers_files
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, is_hub_id, load_autoencoder
from options import UsageError

pytestmark = pytest.mark.usefixtures("process_restored")
TRAIN, TEST = "train_flow_latent.py", "test_flow_latent.py"
ODD = ["dots..", "-rf", "a b", "new\nline", "{x}%s$(touch executed)", "ünï", os.fsdecode(b"\xff\xfe")]


def write_images(folder, classes, count=4):
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                folder / name / f"{index}.png"
            )


def train_flags(place, *more):
    data = ["--dataset", "folder", "--datadir", place / "images", "--image_size", 16]
    network = [
        "--pretrained_autoencoder_ckpt",
        "none",
        "--model_type",
        "DiT-Mi/8",
        "--batch_size",
        4,
        "--device",
        "cpu",
    ]
    run = ["--method", "euler", "--num_steps", 1, "--save_root", place / "saved", "--exp", "run", "--max_steps", 1]
    return [*data, *network, *run, *more]


def entries(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Names.


@pytest.mark.parametrize("script", [TRAIN, TEST])
@pytest.mark.parametrize(
    ("flag", "name"), [("exp", "../../x"), ("exp", f"{os.sep}x"), ("dataset", "../../x"), ("dataset", "..")]
)
@pytest.mark.parametrize("by_file", [False, True])
def test_names_that_lead_elsewhere_are_refused_and_make_nothing(tmp_path, call, script, flag, name, by_file):
    (tmp_path / "saved").mkdir()
    words = [f"--{flag}", name]
    if by_file:
        (tmp_path / "args.txt").write_text(f"{flag.upper()}={name}\n")
        words = ["--args_file", tmp_path / "args.txt"]
    before = entries(tmp_path)
    code, _, err = call(script, [*words, "--save_root", tmp_path / "saved", "--device", "cpu"])
    assert code == 2
    assert f"error: --{flag} {name!r}: expected a plain name" in err
    assert entries(tmp_path) == before


def test_folders_of_classes_may_have_any_name(tmp_path, call):
    """Includes names that are not valid text. Nothing is written outside the run folder, and nothing is executed."""
    write_images(tmp_path / "images", ODD)
    before = entries(tmp_path / "images")
    code, _, err = call(TRAIN, train_flags(tmp_path, "--num_classes", len(ODD)))
    assert code == 0, err
    assert entries(tmp_path / "images") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "saved"]
    folder = tmp_path / "saved" / "latent_flow" / "folder" / "run"
    assert sorted(read_weights(newest_model(folder))[1].dataset.class_names) == sorted(ODD)
    sampling = [
        "--save_root",
        tmp_path / "saved",
        "--exp",
        "run",
        "--dataset",
        "folder",
        "--n_sample",
        7,
        "--device",
        "cpu",
    ]
    sampling += ["--method", "euler", "--num_steps", 1, "--save_images", "png", "--output_dir", tmp_path / "samples"]
    code, _, err = call(TEST, sampling)
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "samples", "saved"]


# Hub ids and paths.


@pytest.mark.parametrize("name", ["/absent/model", "./absent", "../absent/model", "~/model", "a/b/c", "absent"])
def test_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", lambda *_, **__: pytest.fail("asked"))
    assert not is_hub_id(name)
    with pytest.raises(UsageError, match="no such folder"):
        load_autoencoder(AutoencoderOptions(pretrained_autoencoder_ckpt=name), 3)


def test_a_misspelled_folder_is_suspected(tmp_path, monkeypatch):
    def absent(*_, **__):
        raise OSError("no such repository")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers_files, "check_hub", lambda name: None)
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", absent)
    with pytest.raises(UsageError, match="no such repository.*the folder here exists, but does not contain absent"):
        load_autoencoder(AutoencoderOptions(pretrained_autoencoder_ckpt="here/absent"), 3)


def test_a_folder_that_looks_like_a_hub_id_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    new_autoencoder_kl(1, (8, 8), 2, 32, {}).save_pretrained(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked"))
    assert is_hub_id("stabilityai/sd-vae-ft-mse")
    assert not is_hub_id("owner/name")
    assert load_autoencoder(AutoencoderOptions(pretrained_autoencoder_ckpt="owner/name"), 1).factor == 2


# Downloads.


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder and the address that serves its files."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "served").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_downloaded_weights_have_the_hash_in_their_name(served, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder, address = served
    torch.save({"a": torch.ones(2)}, folder / "file.pth")
    digest = hashlib.sha256((folder / "file.pth").read_bytes()).hexdigest()
    names = [f"weights-{digest[:8]}.pth", "weights-00000000.pth"]
    for name in names:
        shutil.copy(folder / "file.pth", folder / name)
    assert weights.download_weights(f"{address}/{names[0]}", "test", "--weights", check_hash=True)["a"].tolist() == [
        1,
        1,
    ]
    with pytest.raises(UsageError, match="invalid hash value"):
        weights.download_weights(f"{address}/{names[1]}", "test", "--weights", check_hash=True)
    assert [path.name for path in (tmp_path / "hub" / "checkpoints").iterdir()] == names[:1]


@pytest.mark.parametrize("network", ["inception", "alexnet"])
def test_what_has_a_hash_is_downloaded_with_it(monkeypatch, network):
    asked = []

    def download(url, what, flag, *, check_hash=False):
        asked.append((url, flag, check_hash))
        raise UsageError("enough")

    if network == "alexnet":
        pytest.importorskip("lpips")
    monkeypatch.setattr({"inception": inception, "alexnet": paired}[network], "download_weights", download)
    with pytest.raises(UsageError, match="enough"):
        inception._build(None, 2048) if network == "inception" else paired.load_lpips(None, "cpu")
    ((url, flag, checked),) = asked
    assert (flag, checked) == ({"inception": "--feature_weights", "alexnet": "--lpips_weights"}[network], True)
    assert torch.hub.HASH_REGEX.search(url)


@pytest.mark.parametrize("bad", [None, 0, 3])
def test_other_digits_than_the_known_ones_are_not_taken(served, tmp_path, monkeypatch, bad):
    """Valid digits are refused too if one of the four files is changed."""
    folder, address = served
    known = []
    for number, name in enumerate(idx.IDX_FILES):
        path = folder / f"{name}.gz"
        shape, size = ((1, 28, 28), 784) if "images" in name else ((1,), 1)
        head = bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)
        path.write_bytes(gzip.compress(head + bytes(size)))
        known.append((path.name, "0" * 32 if number == bad else hashlib.md5(path.read_bytes()).hexdigest()))
    assert torchvision.datasets.MNIST.resources[0] != known[0]
    if bad is not None:
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", known)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{address}/"])
    with pytest.raises(UsageError, match="torchvision's download: .*(corrupted|Error downloading)"):
        idx.find_idx_folder("mnist", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*ubyte*"))
    monkeypatch.setattr(
        torchvision.datasets.MNIST,
        "resources",
        [(name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name, _ in known],
    )
    assert idx.find_idx_folder("mnist", tmp_path / "data") == tmp_path / "data" / "MNIST" / "raw"


def test_another_cifar10_than_the_known_one_is_not_taken(served, tmp_path, monkeypatch):
    (served[0] / "other.tar.gz").write_bytes(b"something else")
    monkeypatch.setattr(CIFAR10, "url", f"{served[1]}/other.tar.gz")
    with pytest.raises(UsageError, match="the download failed .*corrupted"):
        cifar10._download(tmp_path / "data" / "cifar-10-python.tar.gz")
        assert not (tmp_path / "data").exists()


# Data that change between runs.


def test_a_run_does_not_go_on_silently_with_other_images(tmp_path, call):
    """Changes are detected even without a latent cache, when images are read on demand."""
    write_images(tmp_path / "images", ["cat", "dog"])
    flags = train_flags(tmp_path, "--num_classes", 2)
    assert call(TRAIN, flags)[0] == 0
    assert call(TRAIN, flags)[0] == 0  # complete
    (tmp_path / "images" / "cat" / "0.png").unlink()
    code, _, err = call(TRAIN, flags)
    assert code == 2
    assert "other options: number of training images was 7, now 6. " in err
    assert "--resume to resume with this change" in err
    code, _, err = call(TRAIN, [*flags, "--resume"])
    assert code == 0, err
    assert (
        "the run resumes with changed options: number of training images 7 -> 6, state of the training images " in err
    )
    assert call(TRAIN, flags)[0] == 0  # the change is reported only once
    shutil.copytree(tmp_path / "images", tmp_path / "copy", copy_function=shutil.copyfile)
    code, _, err = call(TRAIN, [*flags, "--datadir", tmp_path / "copy"])
    assert code == 0, err
    assert "will not be bit-identical: state of the training images " in err


def test_a_run_without_a_record_of_its_images_resumes(tmp_path, call):
    write_images(tmp_path / "images", ["cat", "dog"])
    assert call(TRAIN, train_flags(tmp_path))[0] == 0
    path = tmp_path / "saved" / "latent_flow" / "folder" / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["options"]["number of training images"], config["options"]["state of the training images"]
    path.write_text(json.dumps(config))
    assert call(TRAIN, train_flags(tmp_path))[0] == 0
    assert json.loads(path.read_text())["options"]["number of training images"] == 7  # recorded from now on


def test_an_image_that_goes_bad_between_runs_is_named(tmp_path):
    write_images(tmp_path, ["cat", "dog"])
    dataset = open_dataset(DatasetOptions("folder", str(tmp_path), 16), "train")
    (tmp_path / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"dog/1\.png"):
        for index in range(len(dataset)):
            dataset[index]
