"""What flow matching asks of the network: targets, loss terms, and weights over time."""
