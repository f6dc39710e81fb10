"""The mathematics of flow matching: objectives, paths, times, solvers, guidance and likelihood.

Throughout, t = 0 is data and t = 1 is noise.
"""
