"""Script that test_runs.py starts in two processes with a launcher: `python two_autoencoders.py FOLDER`."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[4]))  # first, because an installed package is also named `tests`

from runtime.distributed import join_processes
from tests.training.autoencoder.terms import small_runs as runs


def main(folder):
    torch.set_num_threads(1)
    with join_processes() as processes:
        assert processes.count == 2
        run = runs.SmallRun(processes, **runs.ADVERSARIAL, **runs.aligned(folder)).advance(4, rate=1e-4)
        content = run.state.content(processes)
        if processes.is_main:
            torch.save(content, folder / "together.pth")
        print("all is well")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
