"""Training of velocity networks, of small autoencoders, and of the Fashion-MNIST classifier."""
