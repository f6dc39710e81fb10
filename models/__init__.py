"""Velocity networks, the autoencoder and the conditions."""
