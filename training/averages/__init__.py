"""Power averages of the weights over a run's steps, and their reconstruction after training (post-hoc EMA)."""
