"""Sampling: a checkpoint, seeds and labels in, images out."""
