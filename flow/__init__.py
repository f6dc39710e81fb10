"""Pure mathematics of flow matching: paths, times, loss, solvers, guidance. t = 0 is data, t = 1 is noise."""
