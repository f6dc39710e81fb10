"""Trains, resumes, samples and scores each of LFM's experiments from its arguments files, on small data in the real layout.

Networks, images and batches are smaller than LFM's, and FID uses mean colors as features. Everything else follows the files.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.files import read_weights
from evaluation.features.registry import FEATURES
from models.autoencoders.kl import new_autoencoder_kl
from runtime.messages import one_line
from runtime.torch_files import read_torch_file
from tests.fake_features import MeanColors

ROOT = Path(__file__).parents[1]
COUNTS = {"train": 4, "validation": 2}

# Options that shrink the network, and the image size that the levels of its U-Net require at f = 8.
DIT = (["--model_type", "DiT-Mi/2"], 64)
ADM = (["--nf", "32", "--num_res_blocks", "1"], 64)
SMALL = {
    "celeb256_dit": DIT, "ffhq_dit": DIT, "bed_dit": DIT, "church_dit": DIT, "imnet_dit": DIT,
    "imnet_adm": ADM, "celeb256_adm": ADM, "ffhq_adm": ADM, "bed_adm": ADM, "church_adm": ADM,
    "celeb512_adm": (ADM[0], 128), "celeb1024_adm": (ADM[0], 256),
}  # fmt: skip
QUICK = {"celeb256_dit", "bed_adm", "celeb256_adm", "imnet_adm"}  # cover each dataset layout and network family


def picture(seed, side):
    """An image with a random color in each half, one above the other, uint8 [side, side, 3]."""
    colors = np.random.default_rng(seed).integers(0, 256, (2, 1, 3), dtype=np.uint8)
    return np.repeat(np.repeat(colors, side // 2, axis=0), side, axis=1)


def encoded(image, file_format):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, file_format)
    return stream.getvalue()


def write_lmdb(path, items):
    with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for key, value in items:
            transaction.put(key.encode(), value)


def write_raw_lmdb(folder, side):
    for split, count in COUNTS.items():
        write_lmdb(folder / f"{split}.lmdb", [(str(i), picture(i, side).tobytes()) for i in range(count)])


def write_encoded_lmdb(folder, side):
    for split, count in COUNTS.items():
        write_lmdb(folder / f"{split}.lmdb", [(str(i), encoded(picture(i, side), "JPEG")) for i in range(count)])


def write_lsun(folder, side):
    for category in ("church_outdoor", "bedroom"):
        for split, count in zip(("train", "val"), COUNTS.values(), strict=True):
            items = [(f"{i:040x}", encoded(picture(i, side), "WEBP")) for i in range(count)]
            write_lmdb(folder / f"{category}_{split}_lmdb", items)


def write_imagenet(folder, side):
    for split, count in zip(("train", "val"), COUNTS.values(), strict=True):
        for i in range(count):
            class_folder = folder / split / f"n0144076{i % 2}"
            class_folder.mkdir(parents=True, exist_ok=True)
            (class_folder / f"{i}.JPEG").write_bytes(encoded(picture(i, side), "JPEG"))


LAYOUTS = {
    "celeba_256": write_raw_lmdb, "ffhq_256": write_raw_lmdb, "celeba_512": write_encoded_lmdb,
    "celeba_1024": write_encoded_lmdb, "lsun_church": write_lsun, "lsun_bedroom": write_lsun,
    "imagenet_256": write_imagenet,
}  # fmt: skip


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """An autoencoder like Stable Diffusion's (f = 8, 4 latent channels) with a width of only 8."""
    folder = tmp_path_factory.mktemp("autoencoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(3, (8, 8, 8, 8), 4, 64, {"scaling_factor": 0.18215}).save_pretrained(folder)
    return folder


def value_of(file, key):
    return re.findall(rf"^{key}=(.*)$", file.read_text(), re.MULTILINE)[0]


def prepare(name, autoencoder, root):
    """Write the dataset and return the flags for training and sampling."""
    network, side = SMALL[name]
    train_file, test_file = (ROOT / f"{kind}_args" / f"{name}.txt" for kind in ("train", "test"))
    (root / "data").mkdir()
    LAYOUTS[value_of(train_file, "DATASET")](root / "data", side)
    both = ["--datadir", root / "data", "--save_root", root / "saved", *network, "--image_size", side]
    both += ["--pretrained_autoencoder_ckpt", autoencoder]
    train = [train_file, *both, "--batch_size", 2, "--num_process_per_node", 1, "--method", "euler", "--num_steps", 1]
    test = [
        test_file,
        *both,
        "--f",
        8,
        "--scale_factor",
        0.18215,
        "--n_sample",
        4,
        "--batch_size",
        4,
        "--atol",
        0.1,
        "--rtol",
        0.1,
    ]
    return train, [*test, "--output_json", root / "result.json", "--output_log", root / "log"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in SMALL])
def test_train_resume_sample_score(name, autoencoder, call, monkeypatch, tmp_path):
    monkeypatch.setitem(FEATURES, "inception", MeanColors)
    train, test = prepare(name, autoencoder, tmp_path)
    exp, dataset = (value_of(train[0], key) for key in ("EXP", "DATASET"))
    folder = tmp_path / "saved" / "latent_flow" / dataset / exp

    code, out, err = call("train_flow_latent.py", ["--args_file", *train, "--max_steps", 2])
    assert code == 0, err
    assert out.startswith("changed options (")
    assert f"  Run: exp={exp} " in out
    header = read_weights(folder / "model_1.safetensors")[1]
    assert (header.step, header.dataset.name, header.latent_size) == (2, dataset, SMALL[name][1] // 8)
    assert header.autoencoder.scale_factor == 0.18215

    code, out, err = call("train_flow_latent.py", ["--args_file", *train, "--max_steps", 4, "--resume"])
    assert code == 0, err
    assert "resuming at step 2 of 4" in out
    assert read_torch_file(folder / "content.pth")["step"] == 4

    code, out, err = call("test_flow_latent.py", ["--args_file", *test, "--epoch_id", 2])
    assert code == 0, err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["checkpoint"] == str(folder / "model_2.safetensors")
    assert (result["metric"], result["samples"], result["reference_samples"]) == ("FID", 4, COUNTS["train"])
    assert result["value"] > 0
    assert result["nfe"] >= 6
    assert (tmp_path / "log").read_text().startswith(one_line("\n".join(out.splitlines()[-3:])))


def test_task_may_be_anywhere_in_the_file(tmp_path):
    (tmp_path / "x.txt").write_text('# TASK=none\nEXP=x TASK="dance"  # TASK=other\n')
    words = ["bash", str(ROOT / "run.sh"), "x.txt"]
    finished = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert finished.returncode == 2
    assert "expected TASK=generate, inpaint or semantic, but found TASK=dance" in finished.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "usage: bash setup.sh [requirements.txt | requirements-dev.txt]"),
        (["requirements.tx"], 2, "error: requirements.tx: expected requirements.txt or requirements-dev.txt"),
        (["requirements-x.txt"], 2, "error: requirements file requirements-x.txt not found in"),
        (["requirements.txt", "more"], 2, "error: expected one requirements file, but got: requirements.txt more"),
    ],
)
def test_setup_explains_itself_and_touches_nothing(words, code, said, tmp_path):
    shutil.copy(ROOT / "setup.sh", tmp_path)
    (tmp_path / "requirements.txt").touch()
    finished = subprocess.run(
        ["bash", "setup.sh", *words], cwd=tmp_path, text=True, capture_output=True, check=False, timeout=20
    )
    assert (finished.returncode, (finished.stdout + finished.stderr).startswith(said)) == (code, True), finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["requirements.txt", "setup.sh"]


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("fashion_mnist_dit", "flow_latent.py"),
        ("inpainting_kl", "flow_latent_inpainting.py"),
        ("fashion_mnist_inpainting", "flow_latent_inpainting.py"),
        ("semantic_kl", "flow_latent_semantic_syn.py"),
        ("fashion_mnist_semantic", "flow_latent_semantic_syn.py"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "test"])
def test_the_task_chooses_the_script(kind, name, script, tmp_path):
    """Runs the shell scripts with a fake Python that prints its arguments."""
    python = tmp_path / "python3"
    python.write_text('#!/usr/bin/env bash\nif [[ $1 == - ]]; then echo "$0"; else printf "%s\\n" "$@"; fi\n')
    python.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    start = {"train": "run.sh", "test": "run_test.sh"}[kind]
    words = ["bash", str(ROOT / start), f"{kind}_args/{name}.txt", "--seed", "3"]
    finished = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PATH": path}, text=True, capture_output=True, check=False
    )
    expected = [f"{kind}_{script}", "--args_file", str(ROOT / f"{kind}_args" / f"{name}.txt"), "--seed", "3"]
    assert finished.stdout.splitlines() == expected, finished.stderr
    assert (ROOT / expected[0]).is_file()


@pytest.mark.slow
def test_shell_scripts_train_and_sample(autoencoder, tmp_path):
    """Runs run.sh and run_test.sh as a user would. Relative paths of arguments files are relative to the repository."""
    train, test = prepare("celeb256_dit", autoencoder, tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(script, file, *flags):
        words = ["bash", ROOT / script, file.relative_to(ROOT), *flags]
        return subprocess.run(
            [str(word) for word in words], cwd=tmp_path, env={**os.environ, "PATH": path}, text=True,
            capture_output=True, timeout=600, check=False,
        )  # fmt: skip

    finished = run("run.sh", *train, "--max_steps", 2)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("changed options (")
    assert "complete; sample with:" in finished.stdout
    finished = run("run_test.sh", *test, "--epoch_id", 1, "--no-compute_fid")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("changed options (")
    assert re.match(r"samples +4 in ", finished.stdout.splitlines()[-2])
