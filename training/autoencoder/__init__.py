"""Training of autoencoders for datasets without a pretrained one; `run.train_autoencoder` does all of it."""
