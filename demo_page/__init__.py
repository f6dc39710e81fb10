"""A page in the browser that samples from a checkpoint."""
