"""Reading of training images: in which order, and in a thread."""
