"""Sampling of images from a checkpoint, given seeds and labels."""
