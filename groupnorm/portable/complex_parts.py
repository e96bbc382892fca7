"""Complex arrays as their real and imaginary parts; real arrays as they are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter
    from groupnorm.typing import Array

__all__ = ["abs2", "join", "magnitude", "real_part", "split"]


def split(x: "Array", adapter: "Adapter") -> tuple["Array", ...]:
    """Give the real arrays a collective can carry: the array, or its real and imaginary parts."""
    if not adapter.is_complex(x.dtype):
        return (x,)
    return adapter.xp.real(x), adapter.xp.imag(x)


def join(parts: Sequence["Array"], adapter: "Adapter") -> "Array":
    """Undo `split`."""
    return parts[0] if len(parts) == 1 else adapter.complex_from(*parts)


def real_part(x: "Array", adapter: "Adapter") -> "Array":
    """Drop the imaginary part, if there is one."""
    return split(x, adapter)[0]


def abs2(x: "Array", adapter: "Adapter") -> "Array":
    """Square of the absolute value."""
    real, *imaginary = split(x, adapter)
    return real * real + imaginary[0] * imaginary[0] if imaginary else real * real


def magnitude(x: "Array", adapter: "Adapter") -> "Array":
    """Size of each element that cannot overflow: for complex numbers the larger part's."""
    xp = adapter.xp
    real, *imaginary = (xp.abs(part) for part in split(x, adapter))
    return xp.where(real < imaginary[0], imaginary[0], real) if imaginary else real
