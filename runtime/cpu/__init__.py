"""Modules for CPUs only: their cores, threads and compiled layers."""
