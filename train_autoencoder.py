#!/usr/bin/env python
"""Train a small autoencoder for a dataset without a pretrained one, and save it in diffusers format."""

from exits import guarded_imports

with guarded_imports():
    from training.autoencoder.script import run_autoencoder_script


if __name__ == "__main__":
    run_autoencoder_script(str(__doc__))
