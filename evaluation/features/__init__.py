"""Feature networks, which map images to named features."""
