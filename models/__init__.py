"""Velocity networks, autoencoders and conditions."""
