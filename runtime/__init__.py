"""Where the program meets the machine: files, processes, precision, random streams, CPU kernels."""
