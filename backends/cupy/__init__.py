"""CuPy: arrays on a CUDA device, statistics over NCCL ranks, and the GPU kernels."""

from groupnorm.backends.cupy.layer import CupyGroupNorm

__all__ = ["CupyGroupNorm"]
