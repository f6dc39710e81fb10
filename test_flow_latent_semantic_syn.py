#!/usr/bin/env python
"""Generate images from the label maps of held-out images with a trained network, and score them against these images."""

from exits import guarded_imports

with guarded_imports():
    from checkpoints.tasks import SEMANTIC
    from tasks.script import run_conditioned_script
    from tasks.semantic_synthesis import SegmentationOptions, synthesise

if __name__ == "__main__":
    run_conditioned_script(SEMANTIC, synthesise, (SegmentationOptions,), str(__doc__))
