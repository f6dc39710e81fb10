#!/usr/bin/env python
"""Train latent flow matching to make images of label maps, which a learnt 1x1 convolution brings to the network.

The network is guided-diffusion's U-Net (--use_origin_adm) unless another --model_type, or --no-use_origin_adm, is given.
"""

from tasks.semantic_synthesis import SEMANTIC_SYNTHESIS
from training.script import run_training_script

if __name__ == "__main__":
    run_training_script(SEMANTIC_SYNTHESIS, str(__doc__))
