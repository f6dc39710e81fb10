"""Checkpoints of other projects, one module per project: names, order and options of their networks, which are DiT."""
