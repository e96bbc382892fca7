"""Kernels for CPUs: planned by shape, launched in threads; in C++."""
