"""Feature networks: images in, named features out."""
