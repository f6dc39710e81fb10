"""What the entries of a folder of images or latents are: files, classes, splits, labels, or things to leave out."""
