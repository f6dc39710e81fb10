"""The Python interface: docs/python.md's examples run, and samples equal the test script's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import latent_flow
from command_line import parse_options
from options import UsageError
from runtime.distributed import Processes
from sampling.script import mode_groups, run_modes
from tasks.task import GENERATION
from training.script import run_training
from training.setup import training_groups

ROOT = Path(__file__).parents[1]
CHECKPOINT = "saved_info/latent_flow/fashion_mnist/fashion_mnist_dit/best.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_idx):
    """A folder with a small Fashion-MNIST in data/, and the default experiment after two training steps in saved_info/."""
    place = tmp_path_factory.mktemp("place")
    write_idx(place / "data" / "fashion_mnist", {"train": 400, "t10k": 40})
    flags = {
        "args_file": ROOT / "train_args" / "fashion_mnist_dit.txt", "datadir": place / "data",
        "save_root": place / "saved_info", "batch_size": 16, "max_steps": 2, "lr": 0.05, "ema_decay": 0,
        "precision": "fp32", "device": "cpu",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert run_training(GENERATION, parse_options("", training_groups(), words), Processes()) == 0
    return place


@pytest.fixture(scope="module")
def flow(place):
    return latent_flow.load(place / CHECKPOINT, device="cpu", precision="fp32")


def samples_of_the_script(place, *flags):
    out = place / "out" / "_".join(flags).replace("-", "")
    fixed = ["--checkpoint", place / CHECKPOINT, "--device", "cpu", "--precision", "fp32", "--save_images", "npz"]
    words = [*map(str, fixed), "--n_sample", "10", "--batch_size", "4", "--output_dir", str(out), *flags]
    list(run_modes(parse_options("", mode_groups(), words)))
    (file,) = out.rglob("samples.npz")
    with np.load(file) as archive:
        return torch.from_numpy(archive["images"]).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--method", "dpm", "--num_steps", "4"], {"method": "dpm", "steps": 4}),
        (["--method", "dopri5", "--atol", "1e-3"], {"method": "dopri5", "atol": 1e-3}),
        (["--method", "stochastic", "--num_steps", "4"], {"method": "stochastic", "steps": 4}),
        (
            ["--method", "heun", "--num_steps", "3", "--cfg_scale", "4", "--cfg_interval", "0.2", "0.7"],
            {"method": "heun", "steps": 3, "cfg_scale": 4.0, "cfg_interval": (0.2, 0.7)},
        ),
    ],
    ids=["dpm", "dopri5", "stochastic", "guided"],
)
def test_samples_equal_the_test_scripts(place, flow, flags, options):
    expected = samples_of_the_script(place, "--seed", "5", *flags)
    found = flow.sample(labels=range(10), seed=5, **options)
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected)
    assert len(found.unique()) > 10


def test_the_documents_examples_run(place, monkeypatch):
    monkeypatch.chdir(place)
    document = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert len(blocks) >= 8
    names = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["images"].dtype == torch.uint8
    assert names["result"]["value"] >= 0


def test_inverting_and_sampling_reconstructs_the_images(flow):
    images = flow.sample(labels=[3, 4], seed=0, steps=8)
    noise = flow.invert(images, labels=[3, 4], steps=64)
    assert noise.shape == (2, *flow.header.latent_shape)
    back = flow.sample(labels=[3, 4], noise=noise, method="heun", steps=64)
    reconstructed = flow.decode(flow.encode(images))
    assert (back.int() - reconstructed.int()).abs().float().mean() < 2


def test_velocity_applies_guidance(flow):
    t, x = torch.tensor([0.3, 0.6]), torch.randn(2, *flow.header.latent_shape)
    plain, null = flow.velocity(t, x, labels=[1, 2]), flow.velocity(t, x)
    assert plain.dtype == torch.float32
    assert not torch.equal(plain, null)
    guided = flow.velocity(t, x, labels=[1, 2], cfg_scale=3.0)
    torch.testing.assert_close(guided, null + 3 * (plain - null))


def test_images_with_and_without_padding_have_the_same_latents(flow):
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    padded = torch.nn.functional.pad(images, [2] * 4)
    assert torch.equal(flow.encode(images), flow.encode(padded))
    noise = torch.randn(2, *flow.header.latent_shape)
    assert not torch.equal(flow.encode(images), flow.encode(images, noise))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda flow: flow.sample(labels=[3, 11]), r"class ids \[N\] in 0\.\.10, but got \[3, 11\]"),
        (lambda flow: flow.sample(labels=["3"]), r"expected integer class ids or names of T-shirt, .*, but got \['3'\]"),
        (
            lambda flow: flow.sample(labels=[3, 4], noise=torch.zeros(1, *flow.header.latent_shape)),
            "as many labels, noise latents or maps",
        ),
        (lambda flow: flow.sample(noise=torch.zeros(2, 4, 4, 4)), r"noise: expected latents .*\(4, 8, 8\)"),
        (lambda flow: flow.sample(count=0), "at least one sample"),
        (lambda flow: flow.sample(guidance=3), r"unknown keyword guidance: .* method, .*cfg_scale"),
        (lambda flow: flow.sample(method="rk5"), "unknown --method 'rk5'"),
        (lambda flow: flow.sample(time_grid="nope"), "--time_grid nope: expected one of uniform"),
        (lambda flow: flow.sample(atol=-1), "--atol must be at least 0"),
        (lambda flow: flow.sample(steps="many"), "num_steps: expected int, but 'many' was given"),
        (lambda flow: flow.sample(count=1, dense=torch.zeros(1, 3, 8, 8)), "does not take dense maps"),
        (lambda flow: flow.velocity(torch.zeros(1), torch.zeros(1, 4, 4, 4)), "x: expected latents"),
        (lambda flow: flow.invert(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), method="dpm"), "from data to noise"),
        (lambda flow: flow.encode(torch.zeros(1, 1, 28, 28)), "expected images uint8"),
    ],
)  # fmt: skip
def test_mistakes_are_named(flow, call, message):
    with pytest.raises(UsageError, match=message):
        call(flow)


def test_mistakes_in_loading_are_named(place, tmp_path):
    with pytest.raises(UsageError, match="describes its own network: omit dataset"):
        latent_flow.load(place / CHECKPOINT, dataset="mnist")
    with pytest.raises(UsageError, match="cannot read the checkpoint"):
        latent_flow.load(tmp_path / "absent.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "model_1.pth")
    with pytest.raises(UsageError, match="model_tpye: expected any of .*model_type"):
        latent_flow.load(tmp_path / "model_1.pth", model_tpye="DiT-L/2")
    with pytest.raises(UsageError, match="nf must be at least 4"):
        latent_flow.load(tmp_path / "model_1.pth", dataset="celeba_256", image_size=256, nf=-5)


@pytest.mark.slow
def test_the_installed_package_works_from_another_folder(place, tmp_path):
    """Install into a new virtual environment, which borrows the packages installed here."""
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    Path(site.stdout.strip(), "borrowed.pth").write_text("\n".join(borrowed))
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "-q", "-e", str(ROOT)], check=True)
    code = (
        f"import latent_flow, pytorch_fid.inception; flow = latent_flow.load({str(place / CHECKPOINT)!r}, device='cpu');"
        "print(tuple(flow.sample(labels=[3, 4], seed=0, steps=8).shape))"
    )
    found = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.stdout.splitlines()[-1:] == ["(2, 1, 28, 28)"], found.stderr  # after a line about the autoencoder


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Run every cell in order, with fewer training steps."""
    cells = json.loads((ROOT / "examples" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {"TOUR_RUNS": str(tmp_path), "TOUR_STEPS": "4", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}

    found = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    assert "guidance 4: FD (fashion-mnist features)" in found.stdout
