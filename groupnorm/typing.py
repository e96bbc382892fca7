"""Types shared by annotations; importing this module imports no array library."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

__all__ = [
    "Array",
    "ArrayT",
    "AxisIndexGroups",
    "BackendName",
    "DTypeLike",
    "Gradients",
    "Initializer",
    "MaskLike",
]

# No static array API type exists yet that all libraries satisfy.
Array: TypeAlias = Any
# The result has the type of the input array.
ArrayT = TypeVar("ArrayT")
# A name such as "bfloat16", or any library's dtype object.
DTypeLike: TypeAlias = Any
# An array of the same library, or a host value: a NumPy array, a nested list, a bool.
MaskLike: TypeAlias = Any
Initializer: TypeAlias = Callable[..., Any]
BackendName: TypeAlias = Literal["numpy", "jax", "torch", "cupy", "mlx"]
AxisIndexGroups: TypeAlias = Sequence[Sequence[int]]


class Gradients(NamedTuple):
    """Gradients of a scalar with respect to the arguments of `group_norm`.

    Attributes
    ----------
    x : array of shape (N, ..., C)
        In x's dtype.
    scale, bias : array of shape (C,) or None
        In the parameter's dtype and shape; None if there is no such parameter.
    """

    x: Array
    scale: Array | None
    bias: Array | None
