"""NumPy: arrays on the host; statistics over MPI ranks; the kernels for CPUs."""

from groupnorm.backends.numpy.layer import NumpyGroupNorm

__all__ = ["NumpyGroupNorm"]
