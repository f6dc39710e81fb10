"""Scoring: feature networks, statistics of their features, and metrics that compare image sets."""
