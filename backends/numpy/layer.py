"""The layer with NumPy parameters, which accepts arrays of every library."""

from groupnorm.layer import PlainGroupNorm

__all__ = ["NumpyGroupNorm"]


class NumpyGroupNorm(PlainGroupNorm):
    """Group normalization with NumPy parameters; see `groupnorm.GroupNorm`.

    Called with another library's array, it converts its parameters to constants of that library.
    """

    _adapter_name = "numpy"
