#!/usr/bin/env python
"""Serve a page on this machine to sample, interpolate, inpaint and paint label maps with a checkpoint."""

import sys

from exits import exit_cleanly, guarded_imports

with guarded_imports():
    from demo_page.script import run_demo

if __name__ == "__main__":
    exit_cleanly(lambda: run_demo(str(__doc__), sys.argv[1:]))
