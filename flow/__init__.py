"""Pure mathematics of flow matching: objectives, paths, times, solvers, guidance, likelihood. t = 0 is data, t = 1 is noise."""
