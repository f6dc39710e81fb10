#!/usr/bin/env python
"""Inpaint held-out images with a trained network, and score the completions against the images.

A network trained for generation can inpaint too: every solver step restores the latent outside the hole.
"""

from exits import guarded_imports

with guarded_imports():
    from checkpoints.tasks import INPAINT
    from datasets_prep.masks import MaskSetOptions
    from tasks.inpainting import InpaintingOptions, inpaint
    from tasks.script import run_conditioned_script

if __name__ == "__main__":
    run_conditioned_script(INPAINT, inpaint, (MaskSetOptions, InpaintingOptions), str(__doc__))
