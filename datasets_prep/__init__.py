"""Datasets of uint8 images with labels, and caches of their latents."""
