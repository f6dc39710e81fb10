"""Parts of the construction of a training run."""
