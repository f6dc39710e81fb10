"""Pairs of noise and the sample that a trained flow makes of it."""
