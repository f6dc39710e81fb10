"""Datasets as uint8 images with labels, and the cache of their latents."""
