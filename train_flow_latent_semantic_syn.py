#!/usr/bin/env python
"""Train latent flow matching for semantic synthesis. The network also sees a label map, through a learned 1x1 convolution.

The default network is guided-diffusion's U-Net (--use_origin_adm). --model_type or --no-use_origin_adm selects another.
"""

from exits import guarded_imports

with guarded_imports():
    from tasks.semantic_synthesis import SEMANTIC_SYNTHESIS
    from training.script import run_training_script

if __name__ == "__main__":
    run_training_script(SEMANTIC_SYNTHESIS, str(__doc__))
