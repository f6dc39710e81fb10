"""Two processes with half of the batch each train the same autoencoder as one with the whole batch (gloo, on the CPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.torch_files import read_torch_file
from tests.training.autoencoder.small_images import PARALLEL, TINY, blobs, dataset_of, train
from training.autoencoder.networks import initial_network
from training.autoencoder.run import autoencoder_options


def flat(weights):
    return torch.cat([value.flatten() for value in weights.values()])


def test_two_processes_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*command, Path(__file__).with_name("two_processes.py"), tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("all is well") == 1
    for name, options in PARALLEL.items():
        alone = train(tmp_path / f"{name}, alone", held_out=dataset_of(blobs(70)), **options)
        one, two = (read_torch_file(tmp_path / f"{run}.training" / "content.pth") for run in (f"{name}, alone", name))
        begun = initial_network(dataset_of(blobs(64)).facts, autoencoder_options(**TINY | options)).state_dict()
        start, first, second = (flat(weights) for weights in (begun, one["network"], two["network"]))
        assert (second - first).norm() < 0.01 * (first - start).norm()
        torch.testing.assert_close(flat(two["ema"]["weights"]), flat(one["ema"]["weights"]), atol=1e-4, rtol=0)
        found = (tmp_path / f"{name}.training" / "result.json").read_text()
        assert json.loads(found)["validation"]["psnr_db"] == pytest.approx(alone.validation["psnr_db"], abs=1e-3)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
