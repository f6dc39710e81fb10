"""Cutting of a few large pictures into many small training images."""
