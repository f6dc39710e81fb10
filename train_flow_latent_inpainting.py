#!/usr/bin/env python
"""Train latent flow matching to inpaint: the network sees the latent of the masked image and the mask beside x_t.

The network is guided-diffusion's U-Net (--use_origin_adm) unless another --model_type, or --no-use_origin_adm, is given.
"""

from functools import partial

from datasets_prep.masks import MaskOptions
from datasets_prep.tasks import INPAINT
from models.conditions import ConditionOptions
from runtime.launch import run_script
from training.script import IGNORED_FLAGS, run_training
from training.setup import TRAINING_GROUPS

if __name__ == "__main__":
    groups = (*TRAINING_GROUPS, MaskOptions, ConditionOptions)
    run_script(partial(run_training, INPAINT), str(__doc__), groups, ignored=IGNORED_FLAGS, task=INPAINT.name)
