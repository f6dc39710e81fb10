#!/usr/bin/env python
"""Make images of the held-out images' label maps with a trained network, and score them against the images."""

from checkpoints.tasks import SEMANTIC
from options import Options
from runtime.distributed import Processes
from runtime.launch import run_script
from tasks.conditioned_sampling import report
from tasks.conditioned_setup import CONDITIONED_GROUPS, IGNORED_FLAGS
from tasks.semantic_synthesis import SegmentationOptions, synthesise


def main(options: Options, processes: Processes) -> None:
    """Make the images, and say what came out."""
    print(options.describe("those that differ from the defaults; the others: --help"))
    report(synthesise(options, processes), options, processes)


if __name__ == "__main__":
    run_script(
        main, str(__doc__), (*CONDITIONED_GROUPS, SegmentationOptions), ignored=IGNORED_FLAGS, task=SEMANTIC.name
    )
