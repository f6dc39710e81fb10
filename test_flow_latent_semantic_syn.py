#!/usr/bin/env python
"""Make images of the held-out images' label maps with a trained network, and score them against the images."""

from datasets_prep.tasks import SEMANTIC
from evaluation.conditioned_sampling import report
from evaluation.conditioned_source import CONDITIONED_GROUPS, IGNORED_FLAGS
from evaluation.semantic import SegmentationOptions, synthesise
from options import Options
from runtime.distributed import Processes
from runtime.launch import run_script


def main(options: Options, processes: Processes) -> None:
    """Make the images, and say what came out."""
    print(options.describe("those that differ from the defaults; the others: --help"))
    report(synthesise(options, processes), options, processes)


if __name__ == "__main__":
    run_script(
        main, str(__doc__), (*CONDITIONED_GROUPS, SegmentationOptions), ignored=IGNORED_FLAGS, task=SEMANTIC.name
    )
