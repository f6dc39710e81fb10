#!/usr/bin/env python
"""Sample from a trained latent flow, and score the samples. Everything about the network comes from its checkpoint."""

from checkpoints.tasks import GENERATE
from runtime.launch import run_script
from sampling.script import IGNORED_FLAGS, MODE_GROUPS, run

if __name__ == "__main__":
    run_script(run, str(__doc__), MODE_GROUPS, ignored=IGNORED_FLAGS, task=GENERATE.name)
