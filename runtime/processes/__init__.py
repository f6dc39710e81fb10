"""Starting, stopping and joining the processes of a run."""
