"""Terms of the loss of autoencoder training that have networks of their own, and what all terms have in common."""
