"""Training with few-step objectives, by the scripts."""

import json
import math
import shutil

import pytest
import torch

import latent_flow
from checkpoints.files import read_header
from datasets_prep.latent_cache import open_standalone_cache
from flow.objectives import OBJECTIVES
from models.autoencoders.kl import new_autoencoder_kl
from sampling.noise import noise_for_indices
from training.data import StepStreams

TRAIN = "train_flow_latent.py"
GUIDED = ["--target_omega", 1, "--target_kappa", 0.5, "--target_interval", 0, 0.7]
NETWORK = {
    "mean_flow": ["--until_embedding", "interval", *GUIDED],
    "improved_mean_flow": ["--until_embedding", "interval", "--guidance_embedding", "--largest_guidance", 8],
    "decoupled_mean_flow": ["--until_embedding", "decoupled", "--log_variance_head", *GUIDED],
    "alpha_flow": ["--until_embedding", "decoupled", *GUIDED],
    "shortcut": ["--until_embedding", "interval"],
    "split_mean_flow": ["--until_embedding", "decoupled"],
    "consistency": ["--until_embedding", "interval"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_idx):
    place = tmp_path_factory.mktemp("few_steps")
    write_idx(place / "data", {"train": 64, "t10k": 8})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_autoencoder_kl(1, (8, 8, 8), 2, 32, {"scaling_factor": 0.5}).save_pretrained(place / "ae")
    return place


def flags(place, *more, exp="run"):
    data = ["--dataset", "fashion_mnist", "--datadir", place / "data", "--pretrained_autoencoder_ckpt", place / "ae"]
    network = ["--model_type", "DiT-Mi/4", "--num_classes", 10, "--label_dropout", 0.2, "--precision", "fp32"]
    length = [
        "--batch_size",
        16,
        "--max_steps",
        3,
        "--log_every",
        1,
        "--lr",
        1e-3,
        "--method",
        "euler",
        "--num_steps",
        2,
    ]
    return [*data, *network, *length, "--save_root", place / "saved", "--exp", exp, *more]


def test_every_objective_for_average_velocities_is_here():
    assert set(NETWORK) == {name for name, family in OBJECTIVES.items() if family.trains_averages}


@pytest.mark.parametrize("name", NETWORK)
def test_an_objective_trains_and_its_header_records_it(name, place, call):
    """One of the three steps trains the velocity, and two train intervals."""
    numbers = [StepStreams(1024, step, 16, (1, 8, 8), torch.device("cpu")).number("flow step") for step in range(3)]
    share = round((min(numbers) + sorted(numbers)[1]) / 2, 3)
    few = ["--flow_share", share, "--method", "flow_map"]
    code, _, err = call(TRAIN, flags(place, "--objective", name, *NETWORK[name], *few, exp=name))
    assert code == 0, err
    folder = place / "saved" / "latent_flow" / "fashion_mnist" / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) == 3
    assert all(math.isfinite(line["loss"]) and line["skipped"] == 0 for line in train)
    assert all(line["grad_norm"] > 0 for line in train)
    header = read_header(folder / "model_1.safetensors")
    assert header.objective == name
    assert header.path.flow_share == share
    assert (folder / "samples" / "step_0000003.png").exists()
    assert any(line["kind"] == "validation" for line in lines)


def folder_of(place, exp):
    return place / "saved" / "latent_flow" / "fashion_mnist" / exp


@pytest.fixture
def pairs(place, call):
    """Pairs of a flow trained for three steps, built once."""
    if not (place / "pairs").exists():
        code, _, err = call(TRAIN, flags(place, exp="teacher"))
        assert code == 0, err
        code, err = build(place, call, place / "pairs")
        assert code == 0, err
    return place / "pairs"


def build(place, call, folder, *more):
    checkpoint = ["--checkpoint", folder_of(place, "teacher") / "model_1.safetensors"]
    solver = ["--method", "euler", "--num_steps", 4, "--precision", "fp32", "--cfg_scale", 1.5]
    command = [
        *checkpoint,
        "--dataset",
        "fashion_mnist",
        "--pairs",
        folder,
        "--n_pairs",
        40,
        "--batch_size",
        16,
        *solver,
    ]
    code, _, err = call("datasets_prep/build_pairs.py", [*command, *more])
    return code, err


def test_pairs_are_the_samples_of_their_noise(pairs, place):
    flow = latent_flow.load(folder_of(place, "teacher") / "model_1.safetensors", precision="fp32")
    cache, manifest = open_standalone_cache(pairs)
    rows = cache.moments(torch.arange(40), torch.zeros(40, dtype=torch.bool)).float()
    samples, noise = rows.chunk(2, dim=1)
    expected = noise_for_indices(42, range(40), (2, 8, 8))
    torch.testing.assert_close(noise, expected, rtol=1e-3, atol=1e-3)
    assert cache.labels.tolist() == [i % 10 for i in range(40)]
    assert manifest["teacher"]["guidance"]["cfg_scale"] == 1.5
    decoded = flow.sample(count=40, method="euler", steps=4, cfg_scale=1.5)
    again = flow.decode(samples)
    assert (again.int() - decoded.int()).abs().max() <= 2


def test_reflow_trains_on_pairs(pairs, place, call):
    network = ["--until_embedding", "none"]
    command = flags(place, "--objective", "reflow", "--pairs", pairs, "--reflow_huber", 0.01, *network, exp="reflow")
    code, _, err = call(TRAIN, [*command, "--time_sampling", "u_shaped"])
    assert code == 0, err
    header = read_header(folder_of(place, "reflow") / "model_2.safetensors")  # 40 pairs are two steps of 16
    assert header.objective == "reflow"
    assert header.path.pairs == str(pairs)
    code, _, err = call(TRAIN, flags(place, "--objective", "reflow", exp="other"))
    assert code == 2
    assert "--objective reflow needs pairs of noise and samples" in err


def test_other_pairs_are_refused_and_a_finished_folder_stays(pairs, place, call):
    before = {path: path.stat().st_mtime_ns for path in pairs.iterdir()}
    assert build(place, call, pairs)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in pairs.iterdir()} == before
    code, err = build(place, call, pairs, "--seed", 7)
    assert code == 2
    assert "holds other pairs" in err
    code, err = build(place, call, place / "noisy", "--method", "stochastic")
    assert code == 2
    assert "this solver adds noise" in err
    assert not (place / "noisy" / "manifest.json").exists()


def test_a_resume_notices_other_pairs_in_the_same_folder(pairs, place, call):
    shutil.copytree(pairs, folder := place / "rebuilt")
    few = flags(place, "--objective", "reflow", "--pairs", folder, "--max_minutes", 1e-9, exp="rebuilt")
    assert call(TRAIN, few)[0] == 0
    shutil.rmtree(folder)
    assert build(place, call, folder, "--seed", 7)[0] == 0
    code, _, err = call(TRAIN, few)
    assert code == 2
    assert "holds a run with other options: state of the training pairs was" in err
