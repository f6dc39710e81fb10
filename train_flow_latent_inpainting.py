#!/usr/bin/env python
"""Train latent flow matching for inpainting. The network also sees the masked image's latent and the mask.

The default network is guided-diffusion's U-Net (--use_origin_adm). --model_type or --no-use_origin_adm selects another.
"""

from exits import guarded_imports

with guarded_imports():
    from tasks.inpainting import INPAINTING
    from training.script import run_training_script

if __name__ == "__main__":
    run_training_script(INPAINTING, str(__doc__))
