"""Gradients of a reference by differences in float64: independent of every library's own."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from groupnorm.testing.compare import wide

__all__ = ["differences"]

Array = Any

# Steps relative to the spread of an array. From the largest on, errors of truncation fall as the
# fourth power, until those of rounding rise; the estimate that changes least is taken.
STEPS = tuple(10.0 ** (-k / 2) for k in range(2, 11))


def differences(
    function: Callable[..., Sequence[Array]],
    arrays: Sequence[Array],
    position: int,
    elements: Sequence[tuple[int, ...]],
    cotangents: Sequence[Array],
) -> Array:
    """Return derivatives of the pairing of a function's results with cotangents.

    Parameters
    ----------
    function : callable
        Takes all arrays in float64, and returns a list of arrays.
    arrays : sequence of ndarray
    position : int
        Of the array to differentiate with respect to.
    elements : sequence of tuple of int
        The indices of its elements that are wanted.
    cotangents : sequence of ndarray
        One for each result.

    Returns
    -------
    ndarray, shape (len(elements),)
        For complex arrays dL/dRe + i dL/dIm.
    """
    given = [wide(a) for a in arrays]
    spread = _spread(given[position])
    directions = (1.0, 1j) if given[position].dtype.kind == "c" else (1.0,)

    def along(index: tuple[int, ...], step: float, direction: complex) -> float:
        """Return the central difference of fourth order."""
        total = 0.0
        for weight, distance in ((8.0, 1.0), (-1.0, 2.0)):
            results = []
            for sign in (1.0, -1.0):
                moved = list(given)
                moved[position] = given[position].copy()
                moved[position][index] += sign * distance * step * direction
                results.append([wide(y) for y in function(*moved)])
            for plus, minus, c in zip(*results, cotangents, strict=True):
                total += weight * float(np.sum(np.conj(wide(c)) * (plus - minus)).real)
        # Division by the step that was taken after rounding, not by the one that was wanted.
        at = given[position][index]
        taken = abs((at + step * direction) - (at - step * direction)) / 2
        return float(total / (12.0 * taken))

    def derivative(index: tuple[int, ...], direction: complex) -> float:
        estimates = [along(index, spread * s, direction) for s in STEPS]
        changes = [abs(a - b) for a, b in pairwise(estimates)]
        return estimates[int(np.nanargmin(changes)) + 1] if np.isfinite(changes).any() else np.nan

    found = [[derivative(index, d) for d in directions] for index in elements]
    parts = np.array(found).reshape(len(elements), len(directions))
    return parts[:, 0] + 1j * parts[:, 1] if len(directions) == 2 else parts[:, 0]


def _spread(a: Array) -> float:
    values = a[np.isfinite(a)]
    if values.size == 0:
        return 1.0
    return float(np.std(values)) or float(np.max(np.abs(values))) or 1.0
