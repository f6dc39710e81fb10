"""Auxiliary training losses on the tokens after a block of the network, added to any objective."""
