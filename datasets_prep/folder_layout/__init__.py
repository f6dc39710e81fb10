"""How a folder of images or latents is read: its files, classes, splits and labels, and the entries to leave out."""
