"""The objective of a run: its options, checked against the network and the data."""
