"""System-level code: files, processes, precision, random streams, and CPU kernels."""
