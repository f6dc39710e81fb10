"""Two processes with half of the batch each give the same results as one with the whole batch (gloo, on the CPU).

All tests use one launch of `two_processes.py`, which trains the runs defined in test_loop.py.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.files import read_weights
from runtime.torch_files import read_torch_file
from training.loop import train

HERE = Path(__file__).parent
RATE = 1e-4  # same as in two_processes.py
AVERAGES = {"posthoc_ema": (0.05, 0.1), "posthoc_ema_every": 5}  # same as in two_processes.py

specification = importlib.util.spec_from_file_location("test_loop_runs", HERE / "test_loop.py")
runs = importlib.util.module_from_spec(specification)
specification.loader.exec_module(runs)


def launch(folder, *arguments):
    """Run `two_processes.py FOLDER [...]` in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*command, HERE / "two_processes.py", folder, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("all is well") == 1  # printed by the main process only


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of two processes, and the runs `alone` and `alone, first step` of one process."""
    folder = tmp_path_factory.mktemp("parallel")
    stop = (3, runs.send_signal(signal.SIGTERM))
    assert not train(runs.new_run(folder / "begun alone", event=stop, lr=RATE, **AVERAGES), resume=False)
    launch(folder)
    assert train(runs.new_run(folder / "alone", lr=RATE, **AVERAGES), resume=False)
    assert train(runs.new_run(folder / "alone, first step", lr=RATE, max_steps=1), resume=False)
    return folder


def files_of(run):
    """Names of a run's files, except content.previous.pth, which exists only after an interruption."""
    kept = {path.name for path in run.rglob("*") if path.suffix in (".safetensors", ".png", ".pth")}
    return kept - {"content.previous.pth"}


def greatest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def assert_same_gradients(one, other):
    """Compare gradients after one step, when Adam's exp_avg is a tenth of the gradient."""
    one, other = (read_torch_file(run / "content.pth")["optimizers"][0]["state"] for run in (one, other))
    assert one.keys() == other.keys()
    for number in one:
        gradient, same = one[number]["exp_avg"], other[number]["exp_avg"]
        assert (gradient - same).abs().max() <= 1e-6 * max(1e-2, gradient.abs().max())
    assert max(values["exp_avg"].abs().max() for values in one.values()) > 1e-3


@pytest.mark.parametrize("name", ["first step", "first step, accumulated", "first step, sharded"])
def test_gradients_equal_one_processs(folder, name):
    assert_same_gradients(folder / "alone, first step", folder / name)


def test_contrasts_cross_the_border_between_processes(folder):
    alone = folder / "alone, first step, contrasted"
    assert train(runs.new_run(alone, lr=RATE, max_steps=1, path=runs.CONTRASTED), resume=False)
    assert_same_gradients(alone, folder / "first step, contrasted")


def test_processes_share_out_variants(folder):
    alone = folder / "alone, first step, augmented"
    assert train(runs.new_augmented_run(alone, lr=RATE, max_steps=1), resume=False)
    assert_same_gradients(alone, folder / "first step, augmented")


@pytest.mark.slow
def test_compiled_gradients_equal_one_eager_processs(tmp_path):
    launch(tmp_path, "compiled")
    assert train(runs.new_run(tmp_path / "alone", lr=RATE, max_steps=1), resume=False)
    assert_same_gradients(tmp_path / "alone", tmp_path / "first step, compiled")


@pytest.mark.parametrize("name", ["replicated", "sharded", "begun alone"])
def test_runs_equal_one_processs_up_to_rounding(folder, name):
    alone, run = read_torch_file(folder / "alone" / "content.pth"), read_torch_file(folder / name / "content.pth")
    assert greatest_difference(alone["network"], run["network"]) < 1e-5
    assert greatest_difference(alone["ema"]["weights"], run["ema"]["weights"]) < 1e-5
    runs.assert_same_metrics_up_to_rounding(folder / "alone", folder / name, rel=1e-5)
    assert files_of(folder / name) == files_of(folder / "alone")


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_interrupted_run_of_two_resumes_bit_for_bit(folder, name):
    runs.assert_same_run(folder / f"{name}, interrupted", folder / name)


def test_processes_follow_the_clock_of_any_of_them(folder):
    """Processes ask each other for what is due every tenth step."""
    run = folder / "by the clock"
    validated = [entry["step"] for entry in runs.metrics_of(run) if entry["kind"] == "validation"]
    assert validated == [10, runs.STEPS]
    assert {path.name for path in (run / "samples").iterdir()} == {"step_0000010.png", "step_0000014.png"}
    weights, same = (read_weights(folder / name / "model_3.safetensors")[0] for name in ("by the clock", "replicated"))
    assert greatest_difference(weights, same) == 0


def test_run_of_two_shared_out_goes_on_alone(folder):
    content = read_torch_file(folder / "begun sharded" / "content.pth")
    assert content["step"] == 10  # processes check each other for signals every tenth step
    assert train(runs.new_run(folder / "begun sharded", lr=RATE, **AVERAGES), resume=True)
    one, other = (read_torch_file(folder / name / "content.pth") for name in ("alone", "begun sharded"))
    assert greatest_difference(one["network"], other["network"]) < 1e-5
    runs.assert_same_metrics_up_to_rounding(folder / "alone", folder / "begun sharded", rel=1e-5)


def test_a_checkpoint_of_sharded_weights_is_complete(folder):
    one, other = (read_weights(folder / name / "model_3.safetensors") for name in ("alone", "sharded"))
    assert greatest_difference(one[0], other[0]) < 1e-5
    assert {name: value.dtype for name, value in one[0].items()} == {name: v.dtype for name, v in other[0].items()}


@pytest.mark.parametrize("name", ["replicated", "sharded", "begun alone"])
def test_power_averages_of_two_processes_equal_one_processs(folder, name):
    paths = sorted(path.name for path in (folder / "alone" / "posthoc_ema").iterdir())
    assert len(paths) == 6
    for path in paths:
        one, other = (read_weights(folder / run / "posthoc_ema" / path) for run in ("alone", name))
        assert greatest_difference(one[0], other[0]) < 1e-3  # a unit in the last place of float16 below 1
        assert one[1].average == other[1].average


def test_samples_of_two_processes_are_in_order(folder):
    with np.load(folder / "samples" / "npz" / "samples.npz") as file:
        assert file["images"].ravel().tolist() == list(range(10))
        assert file["labels"].tolist() == [0, 1] * 5
    for index in range(10):
        with Image.open(folder / "samples" / "png" / f"{index:06d}.png") as image:
            assert np.asarray(image).item() == index
    assert len(list((folder / "samples" / "png").glob("*.png"))) == 10


def test_the_emas_warmup_count_is_restored_exactly(folder):
    updates = read_torch_file(folder / "sharded" / "content.pth")["ema"]["updates"]
    assert torch.equal(updates, torch.tensor(float(runs.STEPS), dtype=torch.float64))
