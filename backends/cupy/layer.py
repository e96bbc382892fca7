"""The layer with CuPy parameters."""

from groupnorm.layer import PlainGroupNorm

__all__ = ["CupyGroupNorm"]


class CupyGroupNorm(PlainGroupNorm):
    """Group normalization with CuPy parameters; see `groupnorm.GroupNorm`."""

    _adapter_name = "cupy"
