"""What only concerns CPUs: their cores, threads and compiled layers."""
