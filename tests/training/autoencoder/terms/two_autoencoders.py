"""Script that test_runs.py starts in two processes with a launcher: `python two_autoencoders.py FOLDER`."""

import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[4]))

from runtime.distributed import join_processes

specification = importlib.util.spec_from_file_location("small_autoencoders", Path(__file__).with_name("small_runs.py"))
runs = importlib.util.module_from_spec(specification)
specification.loader.exec_module(runs)


def main(folder):
    torch.set_num_threads(1)
    with join_processes() as processes:
        assert processes.count == 2
        run = runs.SmallRun(processes, **runs.ADVERSARIAL, **runs.aligned(folder)).advance(4, rate=1e-4)
        content = run.state.content(processes)
        assert processes.gather(run.state.sums[-3].item()) is not None
        if processes.is_main:
            torch.save(content, folder / "together.pth")
        print("all is well")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
