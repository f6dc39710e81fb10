"""Losses of autoencoder training that need another network: perceptual, adversarial and alignment."""
