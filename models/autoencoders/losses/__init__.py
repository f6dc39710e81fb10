"""Losses of autoencoder training that need networks of their own: perceptual, adversarial and alignment."""
