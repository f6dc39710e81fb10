#!/usr/bin/env python
"""Train latent flow matching (LFM, arXiv:2307.08698): unconditional or class-conditional generation."""

from functools import partial

from datasets_prep.tasks import GENERATE
from runtime.launch import run_script
from training.script import IGNORED_FLAGS, run_training
from training.setup import TRAINING_GROUPS

if __name__ == "__main__":
    run_script(
        partial(run_training, GENERATE), str(__doc__), TRAINING_GROUPS, ignored=IGNORED_FLAGS, task=GENERATE.name
    )
