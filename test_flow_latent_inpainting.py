#!/usr/bin/env python
"""Inpaint the held-out images behind masks with a trained network, and score the completions against the images.

Given a network of generation, it puts the known part back at every step instead, which needs no training.
"""

from checkpoints.tasks import INPAINT
from datasets_prep.masks import MaskSetOptions
from options import Options
from runtime.distributed import Processes
from runtime.launch import run_script
from tasks.conditioned_sampling import report
from tasks.conditioned_setup import CONDITIONED_GROUPS, IGNORED_FLAGS
from tasks.inpainting import InpaintingOptions, inpaint


def main(options: Options, processes: Processes) -> None:
    """Inpaint, and say what came out."""
    print(options.describe("those that differ from the defaults; the others: --help"))
    report(inpaint(options, processes), options, processes)


if __name__ == "__main__":
    run_script(
        main,
        str(__doc__),
        (*CONDITIONED_GROUPS, MaskSetOptions, InpaintingOptions),
        ignored=IGNORED_FLAGS,
        task=INPAINT.name,
    )
