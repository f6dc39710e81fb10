"""Augmentation of training images: the changes, and variants of images as a data set."""
