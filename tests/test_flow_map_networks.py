"""Networks with average velocities by the scripts: started from a plain flow, previewed and sampled in few steps."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import latent_flow
from checkpoints.files import load_model, read_weights, save_weights
from models.autoencoders.kl import new_autoencoder_kl
from models.conditions import Condition
from options import UsageError
from sampling.settings import split_settings

TRAIN, TEST = "train_flow_latent.py", "test_flow_latent.py"
FEW = ["--method", "flow_map", "--num_steps", 2]
HEAD = ["--tap_block", 2, "--auxiliary_velocity", 0.5]


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_idx):
    place = tmp_path_factory.mktemp("flow_maps")
    write_idx(place / "data", {"train": 64, "t10k": 8})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(1, (8, 8, 8), 2, 32, {"scaling_factor": 0.5}).save_pretrained(place / "ae")
    return place


def train_flags(place, exp):
    flags = ["--dataset", "fashion_mnist", "--datadir", place / "data", "--pretrained_autoencoder_ckpt", place / "ae"]
    flags += ["--model_type", "DiT-Mi/4", "--batch_size", 16, "--max_steps", 2, "--lr", 1e-2, "--precision", "fp32"]
    flags += ["--num_classes", 10, "--label_dropout", 0.1]
    return [*flags, "--save_root", place / "saved", "--exp", exp]


@pytest.fixture
def trained(place, call):
    """`trained(exp, *flags)` trains once and returns the checkpoint and what training printed."""

    def train(exp, *flags):
        folder = place / "saved" / "latent_flow" / "fashion_mnist" / exp
        if not folder.exists():
            code, out, err = call(TRAIN, [*train_flags(place, exp), *flags])
            assert code == 0, err
            (folder / "printed").write_text(out)
        return folder / "model_1.safetensors", (folder / "printed").read_text()

    return train


@pytest.fixture
def plain(trained):
    return trained("plain", "--method", "euler", "--num_steps", 2)[0]


@pytest.fixture
def decoupled(trained, plain):
    return trained("decoupled", "--init_from", plain, "--until_embedding", "decoupled", *FEW)


@pytest.fixture
def interval(trained, plain):
    own = ["--until_embedding", "interval", "--guidance_embedding", "--objective", "improved_mean_flow"]
    few = ["--largest_guidance", 8, *FEW, "--embedded_guidance", 3, "--reinject_noise", 0.5]
    return trained("interval", "--init_from", plain, *own, *few)


def result(call, place, checkpoint, *flags, name):
    shared = ["--checkpoint", checkpoint, "--dataset", "fashion_mnist", "--datadir", place / "data", "--n_sample", 4]
    outputs = ["--output_dir", place / name, "--output_json", place / f"{name}.json", "--precision", "fp32"]
    code, _, err = call(TEST, [*shared, *outputs, *flags])
    assert code == 0, err
    return json.loads((place / f"{name}.json").read_text())


def test_all_weights_of_a_flow_start_a_decoupled_network_and_previews_take_few_steps(decoupled):
    checkpoint, printed = decoupled
    weights, header = read_weights(checkpoint)
    assert f"loaded {len(weights)} of {len(weights)} weights\n" in printed
    assert (header.network.until_embedding, header.network.takes_until) == ("decoupled", True)
    assert list(checkpoint.parent.rglob("*.png"))


def test_an_interval_embedding_starts_from_a_flow_as_the_same_flow(interval, plain, place, call):
    checkpoint, printed = interval
    weights, header = read_weights(checkpoint)
    new = [name for name in weights if name.startswith(("r_embedder", "guidance_embedder"))]
    assert (
        f"loaded {len(weights) - len(new)} of {len(weights)} weights; no match in name and shape: guidance" in printed
    )
    assert (header.network.until_embedding, header.network.guidance_embedding) == ("interval", True)
    assert load_model(checkpoint).header == header


def test_a_step_follows_the_average_velocity(decoupled, place, call):
    model = load_model(decoupled[0])
    settings = [*FEW, "--time_grid", "quadratic", "--save_images", "npz"]
    found = result(call, place, decoupled[0], *settings, name="two")
    assert (found["nfe"], found["network_evaluations"]) == (2, 2)
    flow = latent_flow.load(decoupled[0], precision="fp32")
    sampler = flow.sampler(*split_settings({}, latent_flow.SolverOptions, latent_flow.GuidanceOptions), seed=42)
    x, condition = sampler.noise(range(4)), Condition(torch.arange(4))
    for t, s in ((1.0, 0.25), (0.25, 0.0)):
        x = x - (t - s) * model.network(torch.full((4,), t), x, condition, until=torch.full((4,), s))
    images = flow.decode(x)[:, 0].numpy()
    with np.load(place / "two" / "samples.npz") as file:
        assert np.array_equal(file["images"].reshape(images.shape), images)
    same = flow.sample(range(4), method="flow_map", steps=2, time_grid="quadratic")
    assert np.array_equal(same[:, 0].numpy(), images)


@pytest.mark.parametrize(("steps", "scale"), [(1, 1), (4, 2)])
def test_evaluations_are_counted_exactly(decoupled, place, call, steps, scale):
    flags = ["--method", "flow_map", "--num_steps", steps, "--cfg_scale", scale, "--compute_nfe"]
    found = result(call, place, decoupled[0], *flags, name="counted")
    assert (found["nfe"], found["nfe_range"]) == (steps, [steps, steps])
    assert found["network_evaluations"] == steps * scale


def test_embedded_guidance_and_fresh_noise_are_settings_of_the_samples(interval, place, call):
    weights, header = read_weights(interval[0])
    for name in ("r_embedder.mlp.2.weight", "guidance_embedder.mlp.2.weight"):
        weights[name] = torch.randn_like(weights[name])
    save_weights(changed := place / "changed.safetensors", weights, header)
    flow, images = latent_flow.load(changed, precision="fp32"), []
    for options in ({}, {"embedded_guidance": 3.0}, {"reinject_noise": 1.0}):
        images.append(flow.sample(range(4), method="flow_map", steps=2, **options))
    assert not any(torch.equal(images[0], other) for other in images[1:])
    flags = [*FEW, "--embedded_guidance", 3, "--reinject_noise", 0.5]
    found = result(call, place, changed, *flags, name="guided")
    assert (found["network_evaluations"], found["guidance"]["embedded_guidance"]) == (2, 3)
    assert found["solver"]["reinject_noise"] == 0.5
    assert "_flow_map_2steps_cfg1_embedded3_seed42" in found["grid"]


def test_everything_that_needs_velocities_works_as_for_the_plain_flow(plain, place, call):
    """Likelihood, inversion and every other solver use until = t."""
    weights, header = read_weights(plain)
    network = replace(header.network, until_embedding="decoupled")
    save_weights(mapped := place / "mapped.safetensors", weights, replace(header, network=network))
    for number, flags in enumerate((["--compute_nll"], ["--mode", "invert"], ["--mode", "trajectory"])):
        flags = [*flags, "--method", "rk4", "--num_steps", 2, "--pictured", 2]
        both = [result(call, place, each, *flags, name=f"{each.stem}{number}") for each in (plain, mapped)]
        for name in ("bits_per_dimension", "latent_rms_error"):
            assert both[0].get(name) == both[1].get(name)


def test_a_trajectory_shows_the_steps(decoupled, place, call):
    found = result(call, place, decoupled[0], *FEW, "--mode", "trajectory", "--pictured", 2, name="trajectory")
    assert found["picture"].endswith("_flow_map_2steps_cfg1_seed42_trajectory.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [],
            "--method flow_map needs a network that predicts average velocities (trained with --until_embedding interval",
        ),
        (
            ["--cfg_scale", 2, "--guide_checkpoint", "plain"],
            "plain/model_1.safetensors predicts velocities only: choose another",
        ),
        (["--mode", "invert"], "--method flow_map cannot integrate from data to noise: choose one of euler"),
        (["--compute_nll"], "--method flow_map cannot integrate from data to noise: choose one of euler"),
        (["--embedded_guidance", 2], "--embedded_guidance 2.0 needs a network that takes a guidance scale as an input"),
    ],
    ids=["plain", "guide", "invert", "likelihood", "guidance"],
)
def test_what_a_network_cannot_do_is_refused(plain, decoupled, place, call, flags, message):
    checkpoint = decoupled[0] if flags else plain
    flags = [plain if word == "plain" else word for word in flags]
    shared = ["--checkpoint", checkpoint, "--dataset", "fashion_mnist", "--datadir", place / "data", "--n_sample", 4]
    code, _, err = call(TEST, [*shared, *FEW, *flags])
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (FEW, "--method flow_map needs a network that predicts average velocities"),
        (["--embedded_guidance", 2], "needs a network that takes a guidance scale as an input"),
        (
            [*FEW, *HEAD, "--until_embedding", "interval", "--internal_guidance", 2],
            "the auxiliary head does not predict average velocities: use --internal_guidance 1 with --method flow_map",
        ),
        (
            ["--model_type", "unet", "--until_embedding", "decoupled"],
            "--until_embedding is an option of DiT and has no effect on unet",
        ),
    ],
)
def test_training_refuses_what_its_previews_cannot_do(place, call, flags, message):
    code, _, err = call(TRAIN, [*train_flags(place, "refused"), *flags])
    assert (code, err.count("error")) == (2, 1), err
    assert message in err
    assert not (place / "saved" / "latent_flow" / "fashion_mnist" / "refused" / "config.json").exists()


def test_the_python_interface_gives_average_velocities_or_refuses(plain, decoupled):
    flow, t, until = latent_flow.load(decoupled[0], precision="fp32"), torch.tensor(0.8), torch.tensor([0.1, 0.3])
    x = torch.randn(2, *flow.header.latent_shape)
    found = flow.velocity(t, x, [1, 2], until=until)
    assert torch.equal(found, flow.network(t.expand(2), x, Condition(torch.tensor([1, 2])), until=until))
    assert torch.equal(flow.velocity(t, x, [1, 2], until=t), flow.velocity(t, x, [1, 2]))
    with pytest.raises(UsageError, match="--method flow_map needs a network that predicts average velocities"):
        latent_flow.load(plain).sample(count=1, method="flow_map")
    with pytest.raises(UsageError, match="needs a network that predicts average velocities"):
        latent_flow.load(plain).velocity(t, x, [1, 2], until=until)
