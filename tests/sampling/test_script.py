"""All modes of the test script, with a tiny random network in pixel space and photographs."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.files import save_weights
from command_line import parse_options
from datasets_prep.datasets import DatasetFacts
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError
from runtime import precision
from sampling.loading import load_sampler
from sampling.request import sampler_request
from sampling.script import mode_groups, run_modes
from tests.headers import header_of

SIDE = 8
NETWORK = DiTOptions(num_in_channels=3, num_out_channels=3, num_classes=2, label_dropout=0.1)


def write_checkpoint(path, seed, options=NETWORK):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network("DiT-Mi/4", SIDE, options)
        for parameter in network.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    facts = DatasetFacts("folder", SIDE, 3, None, True, ("cat", "dog"))
    header = header_of(options, "DiT-Mi/4", SIDE, dataset=facts, step=7)
    save_weights(path, network.state_dict(), header)
    return path


@pytest.fixture
def call(tmp_path, photo_dir):
    """`call(*flags)` runs the test script's modes on a new checkpoint and returns the results."""
    checkpoint = write_checkpoint(tmp_path / "model_1.safetensors", seed=0)

    def run(*flags, output="out"):
        fixed = [
            "--checkpoint",
            checkpoint,
            "--datadir",
            photo_dir,
            "--precision",
            "fp32",
            "--output_dir",
            tmp_path / output,
        ]
        return list(run_modes(parse_options("", mode_groups(), [*map(str, fixed), *map(str, flags)])))

    return run


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (("--method", "dopri5", "--atol", "1e-5", "--rtol", "1e-5"), "fp32"),
        (("--method", "dopri5", "--atol", "1e-2", "--rtol", "1e-2"), "bf16"),
        (("--method", "dopri5", "--precision", "bf16"), "bf16"),
        (("--method", "euler", "--num_steps", "2"), "bf16"),
    ],
)
def test_adaptive_solvers_with_low_tolerance_default_to_float32(tmp_path, monkeypatch, capsys, flags, chosen):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    checkpoint = write_checkpoint(tmp_path / "model_1.safetensors", seed=0)
    words = ["--checkpoint", str(checkpoint), "--device", "cpu", "--n_sample", "2", *flags]
    loaded = load_sampler(sampler_request(parse_options("", mode_groups(), words)))
    assert loaded.sampler.machine.precision == chosen
    assert re.search(rf"threads?, {chosen}, not compiled", capsys.readouterr().out)


@pytest.mark.parametrize(("batches", "compiled"), [(1000, True), (10, False)])
def test_compilation_is_chosen_for_many_batches_and_recorded(tmp_path, monkeypatch, batches, compiled):
    monkeypatch.setattr(precision, "_why_not_compiled", lambda machine: "")
    checkpoint = write_checkpoint(tmp_path / "model_1.safetensors", seed=0)
    words = ["--checkpoint", str(checkpoint), "--device", "cpu", "--precision", "bf16", "--method", "euler"]
    request = sampler_request(parse_options("", mode_groups(), [*words, "--num_steps", "2"]))
    loaded = load_sampler(request, batches=batches)
    assert loaded.sampler.machine.compile is loaded.settings["compiled"] is loaded.describe()["compiled"] is compiled


def npz(folder):
    with np.load(folder / "samples.npz") as table:
        return {name: table[name] for name in table.files}


def tile_of(sheet, row, column):
    """A tile of a sheet, where images are enlarged seven times and separated by two unscaled pixels."""
    top, left = (2 + (SIDE + 2) * index for index in (row, column))
    return sheet[7 * top : 7 * (top + SIDE) : 7, 7 * left : 7 * (left + SIDE) : 7]


@pytest.mark.parametrize(
    "solver", [("stochastic", 4), ("heun", 3, "--churn", 2), ("dopri5", 1, "--atol", 1e-3, "--rtol", 1e-3)]
)
def test_samples_depend_only_on_seed_and_index(solver, call, tmp_path):
    method, steps, *more = solver
    flags = ["--method", method, "--num_steps", steps, *more, "--cfg_scale", 2, "--save_images", "npz", "--n_sample", 5]
    call(*flags, "--batch_size", 5, output="a")
    call(*flags, "--batch_size", 2, output="b")
    a, b = npz(tmp_path / "a"), npz(tmp_path / "b")
    assert np.abs(a["images"].astype(int) - b["images"]).max() <= 1
    assert np.abs(a["images"][0].astype(int) - a["images"][2]).max() > 20
    call(*flags, "--seed", 43, output="c")
    assert np.abs(npz(tmp_path / "c")["images"].astype(int) - a["images"]).max() > 20


def test_a_resumed_run_samples_only_missing_images(call, tmp_path):
    flags = ["--method", "euler", "--num_steps", 2, "--save_images", "png", "--batch_size", 2]
    (whole,) = call(*flags, "--n_sample", 7, output="whole")
    call(*flags, "--n_sample", 3, output="begun")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "begun").glob("0*.png")}
    (continued,) = call(*flags, "--n_sample", 7, output="begun")
    for index in range(7):
        name = f"{index:06d}.png"
        pixels = [np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("whole", "begun")]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
        if index < 3:
            assert (tmp_path / "begun" / name).stat().st_mtime_ns == times[name]
    assert continued["nfe"] == whole["nfe"] == 2
    assert [run["label_rule"] for run in (continued, whole)] == ["balanced"] * 2
    assert continued["label_counts"] == whole["label_counts"] == [4, 3]
    with pytest.raises(UsageError, match=r"solver\.num_steps was 2, now 3"):
        call(*flags, "--n_sample", 7, "--num_steps", 3, output="begun")


def test_results_of_fixed_step_solvers_are_named_after_their_steps(call, tmp_path):
    results = [
        call("--method", *flags, "--n_sample", 1)[0]
        for flags in (["euler", "--num_steps", 1], ["euler", "--step_size", 0.5], ["dopri5", "--atol", 1, "--rtol", 1])
    ]
    stems = [f"model_1_{name}_cfg1_seed42" for name in ("euler_1steps", "euler_2steps", "dopri5")]
    assert [result["grid"] for result in results] == [str(tmp_path / "out" / f"{stem}.png") for stem in stems]
    for stem, result in zip(stems, results, strict=True):
        assert json.loads((tmp_path / "out" / f"{stem}.json").read_text())["nfe"] == result["nfe"]


def test_the_result_records_how_images_were_decoded(call):
    (result,) = call("--method", "euler", "--num_steps", 1, "--n_sample", 1)
    assert result["precision"] == "fp32"
    assert result["decoding"] == {"precision": "fp32", "rounding": "round(127.5 x + 127.5), clamped to 0..255"}


def test_labels_from_a_file_are_used_and_recorded(call, tmp_path):
    (tmp_path / "labels.txt").write_text("1 1 1 0")
    flags = ["--method", "euler", "--num_steps", 1, "--save_images", "npz", "--n_sample", 4]
    (result,) = call(*flags, "--labels", tmp_path / "labels.txt")
    assert npz(tmp_path / "out")["labels"].tolist() == [1, 1, 1, 0]
    assert result["label_counts"] == [1, 3]
    assert result["label_rule"].startswith("sha256 ")
    with pytest.raises(UsageError, match="labels was sha256"):
        call(*flags, "--labels", "random")


def test_evaluations_under_an_interval(call):
    (result,) = call(
        "--compute_nfe", "--method", "euler", "--num_steps", 10, "--cfg_scale", 3, "--cfg_interval", 0.25, 0.75, "--n_sample", 3
    )  # fmt: skip
    assert (result["nfe"], result["network_evaluations"], result["nfe_range"]) == (10, 15, [10, 10])


def test_autoguidance(call, tmp_path):
    """With the network as its own guide, guidance has no effect. With a different guide, it does."""
    flags = ["--method", "euler", "--num_steps", 2, "--save_images", "npz", "--n_sample", 2]
    call(*flags, output="plain")
    call(*flags, "--cfg_scale", 3, "--guide_checkpoint", tmp_path / "model_1.safetensors", output="itself")
    weaker = write_checkpoint(tmp_path / "weaker.safetensors", seed=1)
    (result,) = call(*flags, "--cfg_scale", 3, "--guide_checkpoint", weaker, output="weaker")
    plain, itself, away = (npz(tmp_path / name)["images"].astype(int) for name in ("plain", "itself", "weaker"))
    assert np.abs(plain - itself).max() <= 1
    assert np.abs(plain - away).max() > 5
    assert (result["nfe"], result["network_evaluations"]) == (2, 4)
    other = write_checkpoint(tmp_path / "other.safetensors", seed=1, options=replace(NETWORK, num_classes=3))
    with pytest.raises(UsageError, match=r"--guide_checkpoint .*other.safetensors: its num_classes is 3, but .* is 2"):
        call(*flags, "--cfg_scale", 3, "--guide_checkpoint", other)


def test_inversion_returns_to_the_images(call, tmp_path):
    (result,) = call("--mode", "invert", "--method", "rk4", "--num_steps", 10, "--pictured", 2)
    assert result["images"] == 1  # the only held-out image
    assert result["latent_rms_error"] < 1e-2
    assert result["psnr_db"] is None or result["psnr_db"] > 45
    (noise,) = tmp_path.glob("out/*_inverted.npz")
    assert np.load(noise)["noise"].shape == (1, 3, SIDE, SIDE)
    with pytest.raises(UsageError, match="--method stochastic cannot integrate from data to noise"):
        call("--mode", "invert", "--method", "stochastic")


def test_interpolation_ends_at_the_samples_of_both_seeds(call, tmp_path):
    flags = ["--method", "euler", "--num_steps", 2]
    (result,) = call("--mode", "interpolate", *flags, "--pictured", 2, "--frames", 3, "--seeds", 5, 9)
    sheet = np.asarray(Image.open(result["picture"]).convert("RGB")).astype(int)
    for seed, column in ((5, 0), (9, 2)):
        call(*flags, "--seed", seed, "--n_sample", 2, "--save_images", "npz", output=f"seed{seed}")
        images = npz(tmp_path / f"seed{seed}")["images"].astype(int)
        for row in range(2):
            tile = tile_of(sheet, row, column)
            assert np.abs(tile - images[row]).max() <= 1
    with pytest.raises(UsageError, match="--seeds: expected two seeds, but found 3"):
        call("--mode", "interpolate", *flags, "--seeds", 1, 2, 3)


def test_trajectory_ends_at_the_sample(call, tmp_path):
    flags = ["--method", "euler", "--num_steps", 4]
    (result,) = call("--mode", "trajectory", *flags, "--pictured", 2, "--frames", 5, "--gif")
    call(*flags, "--n_sample", 2, "--save_images", "npz", output="samples")
    sheet = np.asarray(Image.open(result["picture"]).convert("RGB")).astype(int)
    images = npz(tmp_path / "samples")["images"].astype(int)
    # Each sample has a row of points and a row of data predictions. At the end, both equal the sample.
    for row in range(4):
        tile = tile_of(sheet, row, 4)
        assert np.abs(tile - images[row // 2]).max() <= 1
    gif = result["picture"].replace(".png", ".gif")
    assert result["summary"].splitlines() == [
        "samples     2 trajectories at 5 times", f"picture     {result['picture']}", f"animation   {gif}",
    ]  # fmt: skip
    with Image.open(gif) as animation:
        assert animation.n_frames == 5


def test_likelihood_of_held_out_images(call):
    flags = ["--compute_nll", "--method", "euler", "--num_steps", 2]
    (exact,) = call(*flags, "--exact_trace")
    (estimated,) = call(*flags)
    assert (exact["images"], exact["dimensions"], exact["nfe"]) == (1, 3 * SIDE**2, 2)
    assert exact["bits_per_dimension"] == pytest.approx(estimated["bits_per_dimension"], abs=0.1)
    assert exact["bits_per_dimension"] != estimated["bits_per_dimension"]


def test_several_modes_run_in_one_call_and_write_results(call, tmp_path):
    times, counts = call(
        "--measure_time", "--compute_nfe", "--method", "euler", "--num_steps", 2, "--n_sample", 3,
        "--time_batch_sizes", 1, 2, "--time_repeats", 3,
    )[::-1]  # fmt: skip
    assert counts["nfe"] == 2
    assert [row["batch_size"] for row in times["timing"]] == [1, 2]
    for row in times["timing"]:
        assert 0 < row["network"]["fastest_s"] <= row["network"]["median_s"] <= row["network"]["slowest_s"]
        assert row["pipeline"]["fastest_s"] > 0
    written = json.loads((tmp_path / "out" / "model_1_euler_2steps_cfg1_seed42_time.json").read_text())
    assert written["timing"] == times["timing"]
