"""Folders that diffusers loads: writing one from a checkpoint, the code inside it, and reading one again."""
