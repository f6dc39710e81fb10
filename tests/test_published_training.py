"""Training by the scripts from files of SiT, REPA, LightningDiT, MeanFlow and RAE, and files for their code afterwards."""

from dataclasses import fields

import pytest
import torch

from checkpoints.conversion import to_published
from checkpoints.files import load_model, read_weights
from checkpoints.projects.registry import PROJECTS
from models.dit import DiTOptions
from models.registry import build_network, published_options

SIZES = {"model_width": 32, "model_depth": 3, "model_heads": 2}
HEAD = {"ddt_blocks": 1, "ddt_width": 48, "ddt_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_idx):
    place = tmp_path_factory.mktemp("published")
    write_idx(place / "data", {"train": 40, "t10k": 8})
    return place


def options_of(name):
    own = SIZES | (HEAD if name == "DiTDH" else {})
    channels = {"num_in_channels": 1, "num_out_channels": 1, "num_classes": 10}
    return DiTOptions(**channels | published_options(name) | own), own


@pytest.mark.parametrize("name", PROJECTS)
def test_two_steps_continue_from_a_file(name, place, call):
    torch.manual_seed(0)
    options, own = options_of(name)
    weights = build_network("DiT/8", 32, options).state_dict()
    content = {theirs: weights[ours] + 0.02 for theirs, ours in PROJECTS[name].names(weights).items()}
    torch.save({"model": weights, "ema": content}, place / f"{name}.pt")
    flags = ["--dataset", "fashion_mnist", "--datadir", place / "data", "--pretrained_autoencoder_ckpt", "none"]
    flags += ["--model_type", f"{name}/8", "--num_classes", 10, "--init_from", place / f"{name}.pt", "--max_steps", 2]
    flags += ["--batch_size", 16, "--precision", "fp32", "--method", "euler", "--num_steps", 2, "--lr", 1e-3]
    flags += [item for option, value in own.items() for item in (f"--{option}", value)]
    code, out, err = call("train_flow_latent.py", [*flags, "--save_root", place / "saved", "--exp", name])
    assert code == 0, err
    assert f"loaded {len(content)} of {len(content)} weights\n" in out
    folder = place / "saved" / "latent_flow" / "fashion_mnist" / name
    trained, header = read_weights(folder / "model_1.safetensors")
    differing = [
        field.name for field in fields(options) if getattr(options, field.name) != getattr(header.network, field.name)
    ]
    assert (header.step, differing) == (2, [])
    assert (trained["blocks.0.attn.qkv.weight"] - weights["blocks.0.attn.qkv.weight"] - 0.02).abs().max() < 0.01
    to_published(folder / "model_1.safetensors", place / "back.pt", name)
    found = torch.load(place / "back.pt", weights_only=True)
    assert list(found.get("ema", found)) == list(content)
    network = load_model(folder / "model_1.safetensors").network
    assert network(torch.tensor(0.5), torch.randn(1, 1, 32, 32)).isfinite().all()
