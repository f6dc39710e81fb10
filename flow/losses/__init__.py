"""Options of flow matching's training loss: the network's target, loss terms, and weights over time."""
