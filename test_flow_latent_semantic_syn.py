#!/usr/bin/env python
"""Make images of the held-out images' label maps with a trained network, and score them against the images."""

from checkpoints.tasks import SEMANTIC
from tasks.script import run_conditioned_script
from tasks.semantic_synthesis import SegmentationOptions, synthesise

if __name__ == "__main__":
    run_conditioned_script(SEMANTIC, synthesise, (SegmentationOptions,), str(__doc__))
