"""The scripts in several processes, started as a user would: with a flag, torchrun or accelerate launch."""

import gzip
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.torch_files import read_torch_file

ROOT = Path(__file__).parents[1]
TRAIN, TEST = "train_flow_latent.py", "test_flow_latent.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
LIMIT_S = 900


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 100 training and 20 test images of noise in the format of Fashion-MNIST's files."""
    place, generator = tmp_path_factory.mktemp("launch"), np.random.default_rng(0)
    (place / "data").mkdir()
    for prefix, count in [("train", 100), ("t10k", 20)]:
        images = generator.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        for name, array in [("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)]:
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (place / "data" / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return place


def train_flags(place, exp, batch_size, steps=4):
    data = ["--dataset", "fashion_mnist", "--datadir", place / "data", "--pretrained_autoencoder_ckpt", "none"]
    network = ["--model_type", "DiT-Mi/8", "--num_classes", 10, "--label_dropout", 0.1, "--batch_size", batch_size]
    machine = ["--precision", "fp32", "--method", "euler", "--num_steps", 2, "--num_threads", 1, "--device", "cpu"]
    run = ["--save_root", place / "saved", "--exp", exp, "--max_steps", steps, "--log_every", 1]
    return [*data, *network, *machine, *run]


def folder_of(place, exp):
    return place / "saved" / "latent_flow" / "fashion_mnist" / exp


def environment():
    """This process's environment without the variables that a launcher sets."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def as_processes(launcher, script, flags):
    command = [*launcher, script, *map(str, flags)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def run_in_this_process(monkeypatch, script, flags):
    """Run a script in this process."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    torch.set_num_threads(threads)
    assert ended.value.code == 0


def losses_of(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries]


@pytest.fixture(scope="module")
def pair(place):
    """The finished launcher of a training run in two processes, started with a flag."""
    flags = [*train_flags(place, "pair", 16), "--num_process_per_node", 2, "--beta1", 0.5]
    finished = as_processes([sys.executable], TRAIN, flags)
    assert finished.returncode == 0, finished.stderr
    return finished


def test_a_flag_starts_two_processes_that_train_as_one(place, pair, monkeypatch):
    run_in_this_process(monkeypatch, TRAIN, train_flags(place, "one", 32))
    one, two = (losses_of(folder_of(place, exp)) for exp in ("one", "pair"))
    assert len(one) == 5  # four training steps and one validation
    assert two == pytest.approx(one, rel=1e-5)
    names = [sorted(p.name for p in folder_of(place, exp).rglob("*") if p.is_file() and "tfevents" not in p.name)
             for exp in ("one", "pair")]  # fmt: skip
    assert names[0] == names[1]
    assert len(list((folder_of(place, "pair") / "tensorboard").iterdir())) == 1
    assert json.loads((folder_of(place, "pair") / "config.json").read_text())["options"]["processes"] == 2


def test_two_processes_print_each_line_once(pair):
    assert len(re.findall(r"complete; sample with:\n  \S*python\S* test_flow_latent\.py ", pair.stdout)) == 1
    assert pair.stderr.count("note: --beta1 has no effect") == 1
    assert pair.stdout.count("step 4: validation loss") == 1


def test_sampling_with_torchrun_equals_sampling_in_one_process(place, pair, monkeypatch, tmp_path):
    flags = ["--save_root", place / "saved", "--exp", "pair", "--dataset", "fashion_mnist", "--datadir", place / "data"]
    flags += ["--n_sample", 50, "--batch_size", 8, "--method", "dopri5", "--atol", 1e-2, "--rtol", 1e-2]
    flags += ["--compute_fid", "--save_images", "npz", "--precision", "fp32", "--num_threads", 1, "--device", "cpu"]
    finished = as_processes(
        TORCHRUN, TEST, [*flags, "--output_dir", tmp_path / "2", "--output_json", tmp_path / "2.json"]
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert [line for line in lines if line.startswith("picture ")] == lines[-1:]
    run_in_this_process(
        monkeypatch, TEST, [*flags, "--output_dir", tmp_path / "1", "--output_json", tmp_path / "1.json"]
    )
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert two["value"] == pytest.approx(one["value"], rel=1e-9)
    same = ("samples", "nfe", "recognised", "reference_samples", "weights_sha256")
    assert [one[key] for key in same] == [two[key] for key in same]
    assert (one["processes"], two["processes"]) == (1, 2)
    with np.load(tmp_path / "1" / "samples.npz") as a, np.load(tmp_path / "2" / "samples.npz") as b:
        np.testing.assert_array_equal(a["images"], b["images"])  # equal although the solver is adaptive
        np.testing.assert_array_equal(a["labels"], b["labels"])
    grids = [Path(result["grid"]).read_bytes() for result in (one, two)]
    assert grids[0] == grids[1]


@pytest.mark.slow
def test_an_error_found_by_one_process_is_one_line(place, pair):
    """Only the main process compares the options with the run's, while the other waits."""
    flags = [*train_flags(place, "pair", 16), "--num_process_per_node", 2, "--seed", 7]
    finished = as_processes([sys.executable], TRAIN, flags)
    assert finished.returncode == 2
    assert [line for line in finished.stderr.splitlines() if "checking" not in line] == [
        line for line in finished.stderr.splitlines() if line.startswith("error: ")
    ]
    assert finished.stderr.count("holds a run with other options: --seed was 1024, now 7") == 1


@pytest.mark.slow
def test_an_error_found_by_all_processes_is_one_line(place):
    flags = [*train_flags(place, "cats", 16), "--num_process_per_node", 2, "--num_classes", 3]
    finished = as_processes([sys.executable], TRAIN, flags)
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1
    assert "labels up to 9, out of range for --num_classes 3" in finished.stderr


def interrupt(place, exp, flags, number):
    """Send a signal to the launcher during training in two processes, and return the saved training state."""
    command = [sys.executable, TRAIN, *map(str, flags), "--num_process_per_node", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    record, deadline = folder_of(place, exp) / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not (record.exists() and record.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "to resume, run the same command again, without --overwrite" in out.splitlines()[-1]
    return read_torch_file(folder_of(place, exp) / "content.pth")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_interrupted_processes_save(place, number):
    exp = f"stopped_{number}"
    assert 3 <= interrupt(place, exp, train_flags(place, exp, 8, steps=100_000), number)["step"] < 100_000


@pytest.mark.slow
def test_interrupted_processes_save_and_one_goes_on(place):
    flags = train_flags(place, "stopped", 8, steps=100_000)
    content = interrupt(place, "stopped", flags, signal.SIGINT)
    alone = [*flags, "--batch_size", 16, "--max_minutes", content["seconds"] / 60 + 1e-6]
    finished = as_processes([sys.executable], TRAIN, alone)
    assert finished.returncode == 0, finished.stderr
    assert "will not be bit-identical: processes 2 -> 1" in finished.stderr
    assert read_torch_file(folder_of(place, "stopped") / "content.pth")["step"] > content["step"]


@pytest.mark.slow
def test_training_with_accelerate_launch(place):
    finished = as_processes(
        ACCELERATE, TRAIN, [*train_flags(place, "accelerated", 32, steps=1), "--num_process_per_node", 1]
    )
    assert finished.returncode == 0, finished.stderr
    assert read_torch_file(folder_of(place, "accelerated") / "content.pth")["step"] == 1
