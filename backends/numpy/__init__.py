"""NumPy: arrays on the host, statistics over MPI ranks, and the CPU kernels."""

from groupnorm.backends.numpy.layer import NumpyGroupNorm

__all__ = ["NumpyGroupNorm"]
