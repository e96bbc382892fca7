"""Complex arrays as real and imaginary parts; real arrays unchanged."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter
    from groupnorm.typing import Array

__all__ = ["abs2", "conj", "join", "magnitude", "real_part", "split"]


def split(x: "Array", adapter: "Adapter") -> tuple["Array", ...]:
    """Return the array, or its real and imaginary parts: collectives need real arrays."""
    if not adapter.is_complex(x.dtype):
        return (x,)
    return adapter.xp.real(x), adapter.xp.imag(x)


def join(parts: Sequence["Array"], adapter: "Adapter") -> "Array":
    """Undo `split`."""
    return parts[0] if len(parts) == 1 else adapter.complex_from(*parts)


def real_part(x: "Array", adapter: "Adapter") -> "Array":
    """Return the real part; a real array unchanged."""
    return split(x, adapter)[0]


def conj(x: "Array", adapter: "Adapter") -> "Array":
    """Return the complex conjugate; a real array unchanged."""
    return adapter.xp.conj(x) if adapter.is_complex(x.dtype) else x


def abs2(x: "Array", adapter: "Adapter") -> "Array":
    """Return the squared absolute value."""
    real, *imaginary = split(x, adapter)
    return real * real + imaginary[0] * imaginary[0] if imaginary else real * real


def magnitude(x: "Array", adapter: "Adapter") -> "Array":
    """Return a magnitude that cannot overflow: for complex values that of the larger part."""
    xp = adapter.xp
    real, *imaginary = (xp.abs(part) for part in split(x, adapter))
    return xp.where(real < imaginary[0], imaginary[0], real) if imaginary else real
