"""Tasks beyond plain generation: what inpainting and semantic synthesis add to training and sampling."""
