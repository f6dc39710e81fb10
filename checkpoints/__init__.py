"""Checkpoints: their header, our files and experiment folders, other projects' files, and conversion between them."""
