"""Errors of arrays compared with a reference, in several units."""

from typing import Any, Literal, NamedTuple

import numpy as np

__all__ = [
    "UNITS",
    "Units",
    "Worst",
    "default_bound",
    "dtype_name",
    "eps_of",
    "extended",
    "is_float",
    "ulps",
    "wide",
    "worst",
]

Array = Any
Units = Literal["relative", "mixed", "ulp"]
UNITS = ("relative", "mixed", "ulp")

# How many times the rounding of one operation: sums of some thousand terms, added in pairs.
ROUNDINGS, ROUNDINGS_16 = 50, 4
MAX_ULPS = 64.0


class Worst(NamedTuple):
    """The element of the largest error."""

    error: float
    at: tuple[int, ...]
    value: Any
    reference: Any
    ulps: float


def dtype_name(a: Array) -> str:
    """Return the plain name of the dtype of an array of any library."""
    return str(getattr(a.dtype, "name", a.dtype)).rpartition(".")[2]


def is_float(dtype: "np.dtype[Any]") -> bool:
    """Whether a dtype is real or complex floating, bfloat16 included."""
    return dtype.kind in "fc" or dtype.name == "bfloat16"


def wide(a: Array) -> Array:
    """Return floating numbers in float64 or complex128 (or wider), and others as they are."""
    a = np.asarray(a)
    if not is_float(a.dtype) or a.dtype in (np.longdouble, np.clongdouble):
        return a
    return a.astype(np.complex128 if a.dtype.kind == "c" else np.float64)


def extended(a: Array) -> Array:
    """Return floating numbers in long double, real or complex, and others as they are."""
    if not is_float(a.dtype):
        return a
    return a.astype(np.clongdouble if a.dtype.kind == "c" else np.longdouble)


def eps_of(dtype: "np.dtype[Any]") -> float:
    """Return the distance from 1 to the next number."""
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def default_bound(dtype: "np.dtype[Any]", units: Units) -> float:
    """Return the bound for results of a dtype: what a careful implementation keeps."""
    if not is_float(dtype):
        return 0.0
    if units == "ulp":
        return MAX_ULPS
    return eps_of(dtype) * (ROUNDINGS_16 if dtype.itemsize <= 2 else ROUNDINGS)


def ulps(error: Array, reference: Array, dtype: "np.dtype[Any]") -> Array:
    """Return errors in units in the last place of the reference, as `dtype` has them."""
    if not is_float(dtype):
        return error
    size = np.maximum(np.abs(reference), _tiny(dtype))
    unit = eps_of(dtype) * 2.0 ** np.floor(np.log2(size.astype(np.longdouble)))
    return (error / unit).astype(np.float64)


def worst(actual: Array, reference: Array, units: Units, largest: float | None = None) -> Worst:
    """Return the largest error and where it is.

    Parameters
    ----------
    actual : ndarray
    reference : ndarray
        Of the same shape, wider than `actual`.
    units : {"relative", "mixed", "ulp"}
        Relative to the largest number of the reference; to ``max(1, abs(reference))`` at each
        element; or in units in the last place of each element. NaN and infinities must be equal;
        where they are not, the error is infinite.
    largest : float, optional
        Used instead of the largest number of the reference.
    """
    dtype = actual.dtype
    got, want = wide(actual), wide(reference)
    if got.size == 0:
        return Worst(0.0, (), None, None, 0.0)
    with np.errstate(all="ignore"):
        if not is_float(dtype):
            scaled = in_ulps = np.where(got != want, np.inf, 0.0)
        else:
            same = (got == want) | (np.isnan(got) & np.isnan(want)) | _overflows(got, want, dtype)
            error = np.where(same, 0.0, np.abs(got - want))
            in_ulps = np.where(same, 0.0, ulps(error, want, _part(dtype)))
            if units == "ulp":
                scaled = in_ulps
            elif units == "mixed":
                scaled = error / np.maximum(1.0, np.abs(want))
            else:
                finite = np.abs(want)[np.isfinite(want)]
                size = float(finite.max(initial=0.0)) if largest is None else largest
                scaled = error / max(size, _tiny(dtype))  # below, there are fewer digits
            scaled = np.where(same, 0.0, np.where(np.isfinite(scaled), scaled, np.inf))
    flat = int(np.argmax(scaled))
    index = tuple(int(i) for i in np.unravel_index(flat, scaled.shape))
    return Worst(
        float(scaled[index]), index, actual[index], reference[index], float(in_ulps[index])
    )


def _tiny(dtype: "np.dtype[Any]") -> float:
    """Return the smallest normal number."""
    return 2.0**-126 if dtype.name == "bfloat16" else float(np.finfo(dtype).tiny)


def _overflows(got: Array, want: Array, dtype: "np.dtype[Any]") -> Array:
    """Where the result is infinite because the dtype has no number as large as the reference."""
    if dtype.kind == "c":
        return np.zeros(got.shape, bool)
    largest = 3.3895e38 if dtype.name == "bfloat16" else float(np.finfo(dtype).max)
    return np.isinf(got) & (np.sign(got) == np.sign(want)) & (np.abs(want) > largest)


def _part(dtype: "np.dtype[Any]") -> "np.dtype[Any]":
    """Return the dtype of the parts of complex numbers."""
    return np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype
