"""Scoring: feature networks, their statistics over images, and the metrics between them."""
