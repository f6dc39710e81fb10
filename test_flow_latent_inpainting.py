#!/usr/bin/env python
"""Inpaint the held-out images behind masks with a trained network, and score the completions against the images.

A network trained for generation inpaints without further training: every step puts the known part back.
"""

from checkpoints.tasks import INPAINT
from datasets_prep.masks import MaskSetOptions
from tasks.inpainting import InpaintingOptions, inpaint
from tasks.script import run_conditioned_script

if __name__ == "__main__":
    run_conditioned_script(INPAINT, inpaint, (MaskSetOptions, InpaintingOptions), str(__doc__))
