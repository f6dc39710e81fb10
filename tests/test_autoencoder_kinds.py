"""The scripts train, sample and inpaint with autoencoders without a posterior, with patches, frames, and of files."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from checkpoints.files import read_header
from tests.models.autoencoders.test_kinds import CASES
from tests.models.autoencoders.test_ldm import CASE, golden_weights

SIDE = 32
CLASSES = {"DC-AE": (8, 8), "FLUX.2": (16, 4), "VQGAN": (3, 8), "Qwen-Image": (4, 8), "a file": (6, 8)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Small color images, and an autoencoder of each class."""
    place = tmp_path_factory.mktemp("kinds")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        (place / "data" / split / "a").mkdir(parents=True)
        for index in range(count):
            image = Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
            image.save(place / "data" / split / "a" / f"{index}.png")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in CLASSES.keys() & CASES.keys():
            kind, config, *_ = CASES[name]
            getattr(diffusers, kind)(**config).save_pretrained(place / name)
    with safe_open(CASE, framework="pt") as file:
        torch.save({"state_dict": golden_weights(file)}, place / "a file")
    return place


def run(script, name, place, call, folder, sampling):
    """Train two steps and sample; returns the checkpoint's header."""
    flags = ["--dataset", "folder", "--datadir", place / "data", "--image_size", SIDE, "--precision", "fp32"]
    flags += ["--pretrained_autoencoder_ckpt", place / name, "--model_type", "DiT-Mi/2", "--batch_size", 2]
    flags += ["--max_steps", 2, "--method", "euler", "--num_steps", 2, "--save_root", folder, "--exp", "run"]
    code, _, err = call(f"train_{script}.py", [*flags, "--grid_samples", 2])
    assert code == 0, err
    checkpoint = next(folder.glob("*/folder/run/model_*.safetensors"))
    flags = ["--checkpoint", checkpoint, "--datadir", place / "data", "--method", "euler", "--num_steps", 1]
    code, _, err = call(f"test_{script}.py", [*flags, "--device", "cpu", "--output_dir", folder / "samples", *sampling])
    assert code == 0, err
    assert list((folder / "samples").rglob("*.png"))
    return read_header(checkpoint)


@pytest.mark.parametrize("name", CLASSES)
def test_a_run_trains_and_samples(name, place, call, tmp_path):
    header = run("flow_latent", name, place, call, tmp_path, ["--n_sample", 2, "--save_images", "png"])
    channels, side = CLASSES[name]
    assert header.latent_shape == (channels, side, side)
    assert header.autoencoder.statistics == ("measured" if name == "a file" else "")


@pytest.mark.parametrize("name", ["DC-AE", "FLUX.2"])
def test_a_run_inpaints(name, place, call, tmp_path):
    header = run("flow_latent_inpainting", name, place, call, tmp_path, [])
    assert header.dense.channels == CLASSES[name][0] + 1
