#!/usr/bin/env python
"""Inpaint the held-out images behind masks with a trained network, and score the completions against the images.

Given a network of generation, it puts the known part back at every step instead, which needs no training.
"""

from datasets_prep.masks import MaskSetOptions
from datasets_prep.tasks import INPAINT
from evaluation.conditioned_sampling import report
from evaluation.conditioned_source import CONDITIONED_GROUPS, IGNORED_FLAGS
from evaluation.inpainting import InpaintingOptions, inpaint
from options import Options
from runtime.distributed import Processes
from runtime.launch import run_script


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
