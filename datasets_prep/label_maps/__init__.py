"""Datasets with label maps, for semantic synthesis."""
