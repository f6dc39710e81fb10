#!/usr/bin/env python
"""Train latent flow matching to make images of label maps, which a learnt 1x1 convolution brings to the network.

The network is guided-diffusion's U-Net (--use_origin_adm) unless another --model_type, or --no-use_origin_adm, is given.
"""

from functools import partial

from datasets_prep.tasks import SEMANTIC
from models.conditions import ConditionOptions
from runtime.launch import run_script
from training.script import IGNORED_FLAGS, run_training
from training.setup import TRAINING_GROUPS

if __name__ == "__main__":
    groups = (*TRAINING_GROUPS, ConditionOptions)
    run_script(partial(run_training, SEMANTIC), str(__doc__), groups, ignored=IGNORED_FLAGS, task=SEMANTIC.name)
