"""The layer with NumPy parameters, which arrays of every library can be passed to."""

from groupnorm.layer import PlainGroupNorm

__all__ = ["NumpyGroupNorm"]


class NumpyGroupNorm(PlainGroupNorm):
    """Group normalization with NumPy parameters; see `groupnorm.GroupNorm`.

    Called with another library's array, it carries its parameters over as constants.
    """

    _adapter_name = "numpy"
