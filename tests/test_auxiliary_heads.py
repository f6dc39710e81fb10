"""Training with auxiliary heads and sampling with internal guidance, by the scripts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import latent_flow
from checkpoints.files import read_weights, save_weights
from models.autoencoders.kl import new_autoencoder_kl
from models.taps import weights_for_sampling
from options import UsageError

TRAIN, TEST = "train_flow_latent.py", "test_flow_latent.py"
HEADS = ["--tap_block", 2, "--auxiliary_velocity", 0.5, "--align_latents", 1, "--align_features", 0.5]
HEADS += ["--align_encoder", "test_vit", "--align_projector", "conv", "--align_normalization", 0.8]
ROUTING = ["--route_blocks", 2, 5, "--route_rate", 0.5]
SOLVER = ["--method", "euler", "--num_steps", 5, "--precision", "fp32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_idx):
    place = tmp_path_factory.mktemp("heads")
    write_idx(place / "data", {"train": 64, "t10k": 8})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(1, (8, 8, 8), 2, 32, {"scaling_factor": 0.5}).save_pretrained(place / "ae")
        save_file(timm.create_model("test_vit").state_dict(), place / "encoder.safetensors")
    return place


def train_flags(place, exp="run"):
    flags = ["--dataset", "fashion_mnist", "--datadir", place / "data", "--pretrained_autoencoder_ckpt", place / "ae"]
    flags += ["--model_type", "DiT-Mi/4", "--batch_size", 16, "--max_steps", 3, "--log_every", 1, "--lr", 1e-2]
    return [*flags, "--save_root", place / "saved", "--exp", exp, *SOLVER]


@pytest.fixture
def checkpoint(place, call):
    """A network without classes, with all heads and routing, trained once."""
    folder = place / "saved" / "latent_flow" / "fashion_mnist" / "run"
    if not folder.exists():
        encoder = ["--align_encoder_weights", place / "encoder.safetensors"]
        code, _, err = call(TRAIN, [*train_flags(place), *HEADS, *ROUTING, *encoder, "--internal_guidance", 1.9])
        assert code == 0, err
    return folder / "model_1.safetensors"


def samples(call, place, checkpoint, *flags, output):
    shared = [
        "--checkpoint",
        checkpoint,
        "--dataset",
        "fashion_mnist",
        "--n_sample",
        4,
        "--save_images",
        "npz",
        *SOLVER,
    ]
    code, _, err = call(
        TEST, [*shared, "--output_dir", place / output, "--output_json", place / f"{output}.json", *flags]
    )
    assert code == 0, err
    with np.load(place / output / "samples.npz") as file:
        return file["images"]


def test_everything_is_logged_and_recorded(checkpoint, place):
    lines = [json.loads(line) for line in (checkpoint.parent / "metrics.jsonl").read_text().splitlines()]
    names = {"auxiliary_velocity", "align_latents", "align_features"}
    assert all(names <= line.keys() for line in lines if line["kind"] == "train")
    assert all(-1 <= line["align_features"] <= 1 for line in lines if line["kind"] == "train")
    weights, header = read_weights(checkpoint)
    assert {"auxiliary_head.linear.weight", "projectors.features.convolution.weight"} <= weights.keys()
    assert (header.network.tap_block, header.network.align_width, header.network.route_blocks) == (2, 64, (2, 5))
    assert (header.auxiliary.align_normalization, header.encoder.id) == (0.8, "test_vit")
    assert len(list((place / "data" / "latent_cache" / "features").glob("fashion_mnist_32_train_*/manifest.json"))) == 1


def test_internal_guidance_changes_samples_and_scale_one_does_not(checkpoint, place, call):
    plain = samples(call, place, checkpoint, output="plain")
    one = samples(call, place, checkpoint, "--internal_guidance", 1, output="one")
    guided = samples(call, place, checkpoint, "--internal_guidance", 1.9, output="guided")
    part = ["--internal_guidance", 1.9, "--internal_guidance_interval", 0.3, 1]
    within = samples(call, place, checkpoint, *part, output="within")
    assert np.array_equal(plain, one)
    assert not np.array_equal(plain, guided)
    assert not np.array_equal(guided, within)
    flow = latent_flow.load(checkpoint, precision="fp32")
    found = flow.sample(count=4, method="euler", steps=5, internal_guidance=1.9)
    assert np.array_equal(found.permute(0, 2, 3, 1).squeeze(-1).numpy(), guided.reshape(found.shape[0], 28, 28))


def test_samples_need_no_projectors(checkpoint, place, call, tmp_path):
    weights, header = read_weights(checkpoint)
    save_weights(tmp_path / "model_1.safetensors", weights_for_sampling(weights), header)
    guided = samples(call, place, checkpoint, "--internal_guidance", 1.9, output="whole")
    without = samples(call, place, tmp_path / "model_1.safetensors", "--internal_guidance", 1.9, output="without")
    assert np.array_equal(guided, without)


def test_a_checkpoint_without_the_head_is_refused(checkpoint, place, call, tmp_path):
    weights, header = read_weights(checkpoint)
    plain = {name: value for name, value in weights_for_sampling(weights).items() if "auxiliary" not in name}
    network = replace(header.network, auxiliary_velocity=0.0, align_latents=0.0, align_features=0.0)
    save_weights(tmp_path / "model_1.safetensors", plain, replace(header, network=network))
    flags = ["--checkpoint", tmp_path / "model_1.safetensors", "--dataset", "fashion_mnist", "--n_sample", 4, *SOLVER]
    assert call(TEST, flags)[0] == 0
    code, _, err = call(TEST, [*flags, "--internal_guidance", 1.9])
    assert code == 2
    assert "--internal_guidance 1.9 needs a network with an auxiliary velocity head" in err
    with pytest.raises(UsageError, match="needs a network with an auxiliary velocity head"):
        latent_flow.load(tmp_path / "model_1.safetensors").sample(count=1, internal_guidance=1.9)


def test_with_other_blocks_and_losses_a_network_trains_and_samples(place, call):
    """Heads on coarse tokens, class tokens, routing, a data prediction and contrastive flow matching in one run."""
    blocks = ["--model_type", "DiT-Mi/2", "--fine_blocks", 2, "--class_tokens", 1, "--rope", "--norm", "rms"]
    losses = ["--prediction", "data", "--contrastive_weight", 0.05, "--num_classes", 10, "--label_dropout", 0.2]
    routing = ["--route_blocks", 2, 4, "--route_rate", 0.5]
    heads = [*HEADS, "--align_encoder_weights", place / "encoder.safetensors", *routing]
    code, out, err = call(TRAIN, [*train_flags(place, "all"), *blocks, *losses, *heads])
    assert code == 0, err
    assert "test_vit: 64 features at 2 x 2 positions" in out
    checkpoint = place / "saved" / "latent_flow" / "fashion_mnist" / "all" / "model_1.safetensors"
    found = [
        samples(call, place, checkpoint, "--cfg_scale", 2, "--internal_guidance", scale, output=f"all {scale}")
        for scale in (1, 1.9)
    ]
    assert not np.array_equal(*found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--internal_guidance", 1.9], "--internal_guidance 1.9 needs a network with an auxiliary velocity head"),
        (["--tap_block", 7, "--auxiliary_velocity", 0.5], "--tap_block 7: expected a block from 1 to 6"),
        (["--model_type", "adm", "--tap_block", 1], "--tap_block is an option of DiT and has no effect on adm"),
        (["--model_type", "adm", "--dispersive", 1], "--dispersive needs a transformer"),
        ([*HEADS, "--align_encoder", "no_such_model"], "cannot load --align_encoder no_such_model"),
        ([*ROUTING, "--tap_block", 3, "--dispersive", 0.5], "--tap_block 3 lies between the --route_blocks 2 5"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_work(place, call, flags, message):
    exp = "refused"
    code, _, err = call(TRAIN, [*train_flags(place, exp), *flags])
    assert (code, err.count("error")) == (2, 1), err
    assert message in err
    assert not (place / "saved" / "latent_flow" / "fashion_mnist" / exp / "config.json").exists()
