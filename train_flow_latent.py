#!/usr/bin/env python
"""Train latent flow matching (LFM, arXiv:2307.08698): unconditional or class-conditional generation."""

from exits import guarded_imports

with guarded_imports():
    from tasks.task import GENERATION
    from training.script import run_training_script

if __name__ == "__main__":
    run_training_script(GENERATION, str(__doc__))
