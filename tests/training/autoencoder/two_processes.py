"""Script that test_parallel.py runs in two processes with a launcher: `python two_processes.py FOLDER`."""

import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from runtime.distributed import join_processes
from training.autoencoder.run import autoencoder_options, train_autoencoder

specification = importlib.util.spec_from_file_location("small_images", Path(__file__).with_name("small_images.py"))
small = importlib.util.module_from_spec(specification)
specification.loader.exec_module(small)


def main():
    torch.set_num_threads(1)
    dataset, held_out = small.dataset_of(small.blobs(64)), small.dataset_of(small.blobs(70))
    with join_processes() as processes:
        for name, options in small.PARALLEL.items():
            given = autoencoder_options(output=f"{sys.argv[1]}/{name}", **small.TINY | options | {"batch_size": 8})
            result = train_autoencoder(dataset, held_out, given, small.CPU, processes)
            assert result.complete
        if processes.is_main:
            print("all is well")


if __name__ == "__main__":
    main()
