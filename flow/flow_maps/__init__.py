"""Objectives that train flow maps, for samples in a few network evaluations."""
