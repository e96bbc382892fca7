"""Assertions about arrays of any library, and of several."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from groupnorm.testing.checks import check
from groupnorm.testing.compare import Units, default_bound, dtype_name, worst
from groupnorm.testing.registry import Row, row_of
from groupnorm.testing.report import Disagreement

__all__ = ["assert_accurate", "assert_gradients", "assert_same"]

Array = Any


def assert_same(actual: Array, expected: Array, *, device: bool = True) -> None:
    """Assert that two arrays, of the same library or of two, hold the same bits.

    Parameters
    ----------
    actual, expected : array
        Of equal shape and dtype. NaN equals NaN, and 0.0 does not equal -0.0.
    device : bool
        Whether two arrays of one library must be on the same device.

    Raises
    ------
    Disagreement
        An `AssertionError` with the first element that differs.
    ArgumentTypeError
        If one is no array.

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import testing
    >>> testing.assert_same(np.arange(3), np.arange(3))
    """
    ours, theirs = row_of(actual, "actual"), row_of(expected, "expected")
    if dtype_name(actual) != dtype_name(expected):
        raise Disagreement(f"dtype {dtype_name(actual)} instead of {dtype_name(expected)}")
    if tuple(actual.shape) != tuple(expected.shape):
        raise Disagreement(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if device and ours.library == theirs.library:
        here, there = ours.device_of(actual), theirs.device_of(expected)
        if here != there:
            raise Disagreement(f"device {here} instead of {there}")
    a, b = (_native(r.to_numpy(y)) for r, y in ((ours, actual), (theirs, expected)))
    if a.tobytes() == b.tobytes():
        return
    differ = (a.reshape(-1, 1).view(np.uint8) != b.reshape(-1, 1).view(np.uint8)).any(axis=1)
    nan = (a != a) & (b != b)
    wrong = np.flatnonzero(differ.reshape(a.shape) & ~nan)
    if len(wrong):
        at = tuple(int(i) for i in np.unravel_index(wrong[0], a.shape))
        raise Disagreement(
            f"{len(wrong)} of {a.size} elements differ: {a[at]!r} instead of {b[at]!r} at "
            f"{list(at)}"
        )


def _native(a: Array) -> Array:
    return np.ascontiguousarray(a.astype(a.dtype.newbyteorder("="), copy=False)).reshape(a.shape)


def assert_accurate(
    actual: Array,
    reference: Array,
    *,
    bound: float | None = None,
    units: Units = "relative",
    dtype: str | None = None,
) -> None:
    """Assert that an array of any library is near a reference of NumPy.

    Parameters
    ----------
    actual : array
    reference : ndarray
        Of the same shape; float64 or wider for floating numbers.
    bound : float, optional
        As for `check`.
    units : {"relative", "mixed", "ulp"}
        As for `check`.
    dtype : str, optional
        The name of the dtype that `actual` must have.

    Raises
    ------
    Disagreement
        An `AssertionError` with the element of the largest error.
    ArgumentTypeError
        If `actual` is no array.

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import testing
    >>> third = np.array([1.0]) / 3
    >>> testing.assert_accurate(third.astype(np.float32), third)
    """
    row = row_of(actual, "actual")
    want = np.asarray(reference)
    if dtype is not None and dtype_name(actual) != dtype:
        raise Disagreement(f"dtype {dtype_name(actual)} instead of {dtype}")
    if tuple(actual.shape) != want.shape:
        raise Disagreement(f"shape {tuple(actual.shape)} instead of {want.shape}")
    got = row.to_numpy(actual)
    allowed = default_bound(got.dtype, units) if bound is None else bound
    found = worst(got, want, units)
    if not found.error <= allowed:
        raise Disagreement(
            f"{found.value} instead of {found.reference} at {list(found.at)}: error "
            f"{found.error:.2g} ({units}), allowed {allowed:.2g}"
        )


def assert_gradients(
    function: Callable[..., Any],
    arrays: "np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]]",
    row: str | Row,
    *,
    reference: Callable[..., Any] | None = None,
    **options: Any,
) -> None:
    """Assert that a library's gradients of a function are right, for random cotangents.

    Parameters
    ----------
    function : callable
    arrays : ndarray or sequence of ndarray
        Its arguments.
    row : str or Row
        Where it runs.
    reference : callable, optional
        As for `check`.
    **options
        Of `check`, such as `gradient_bound`.

    Raises
    ------
    Disagreement
        An `AssertionError` with the element of the largest error.

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import testing
    >>> testing.assert_gradients(
    ...     lambda x: x * x, [np.ones(3)], "numpy:readonly", vjp=lambda x, dy: 2 * x * dy
    ... )
    """
    options = {"gradients": True, **options}
    if isinstance(arrays, np.ndarray):
        arrays = [arrays]
    report = check(function, inputs=tuple(arrays), reference=reference, rows=[row], **options)
    report.findings[:] = [f for f in report.findings if f.what != "value"]
    report.raise_if_wrong()
