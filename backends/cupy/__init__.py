"""CuPy: arrays on a CUDA device; statistics over NCCL ranks; the kernels for GPUs."""

from groupnorm.backends.cupy.layer import CupyGroupNorm

__all__ = ["CupyGroupNorm"]
