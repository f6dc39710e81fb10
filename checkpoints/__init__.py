"""Checkpoints: file format and header, run folders, LFM's files, and conversion between the two formats."""
