"""Two processes with half of the batch each train the same autoencoder as one with the whole batch (gloo, on the CPU)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.torch_files import read_torch_file
from tests.training.autoencoder.small_images import PARALLEL, blobs, dataset_of, train


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
        for weights in ("network", "ema"):
            first, second = (content[weights].get("weights", content[weights]) for content in (one, two))
            for key, value in first.items():
                torch.testing.assert_close(second[key], value, atol=2e-5, rtol=1e-4)
        found = (tmp_path / f"{name}.training" / "result.json").read_text()
        assert f'"psnr_db": {alone.validation["psnr_db"]:.3f}'[:-2] in found


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
