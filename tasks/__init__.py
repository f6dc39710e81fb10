"""Training and sampling for inpainting and semantic synthesis."""
