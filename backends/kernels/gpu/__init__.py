"""Kernels for NVIDIA GPUs: planned by shape, compiled by Triton, launched by each library."""
