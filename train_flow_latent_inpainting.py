#!/usr/bin/env python
"""Train latent flow matching to inpaint: the network sees the latent of the masked image and the mask beside x_t.

The network is guided-diffusion's U-Net (--use_origin_adm) unless another --model_type, or --no-use_origin_adm, is given.
"""

from tasks.inpainting import INPAINTING
from training.script import run_training_script

if __name__ == "__main__":
    run_training_script(INPAINTING, str(__doc__))
