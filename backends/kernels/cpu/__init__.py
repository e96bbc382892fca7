"""Kernels for CPUs: planned by shape, launched in threads; compiled by numba."""
