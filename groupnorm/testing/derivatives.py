"""Gradients of a reference by differences: independent of every library's own."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from groupnorm.testing.compare import wide

__all__ = ["Derivatives", "Index"]

Array = Any
Index = tuple[int, ...]

# A step is worth taking from this many roundings of the element on.
LEAST_ROUNDINGS = 1e5
# Estimates with a rounding error below this are taken for equal where they are as near.
RESOLUTION = 1e-11


class Derivatives:
    """Derivatives of the pairing of a function's results with cotangents, for one argument.

    Parameters
    ----------
    function : callable
        Takes all arrays, and returns a list of arrays.
    arrays : sequence of ndarray
        In float64 or wider.
    position : int
        Of the array to differentiate with respect to.
    cotangents : sequence of ndarray
        One for each result.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Array]],
        arrays: Sequence[Array],
        position: int,
        cotangents: Sequence[Array],
    ) -> None:
        self.function, self.position = function, position
        self.given = [wide(a) for a in arrays]
        self.x = self.given[position]
        self.cotangents = [np.conj(wide(c)) for c in cotangents]
        self.here = self._results(self.x)
        self.spread = _spread(self.x)

    def _results(self, x: Array) -> list[Array]:
        moved = list(self.given)
        moved[self.position] = x
        return [wide(y) for y in self.function(*moved)]

    def _pair(self, ys: list[Array], zs: list[Array]) -> float:
        """Return the pairing of the cotangents with the difference of results."""
        return sum(
            float(np.sum(c * np.where(y == z, 0, y - z)).real)
            for y, z, c in zip(ys, zs, self.cotangents, strict=True)
        )

    def at(self, index: Index) -> tuple[complex, float]:
        """Return the derivative for one element and its error; NaN if there is none.

        For complex arrays dL/dRe + i dL/dIm.
        """
        along = np.zeros(self.x.shape, self.x.dtype)
        along[index] = 1.0
        size = float(abs(self.x[index]))
        real = self.along(along, {self.spread, size}, index)
        if self.x.dtype.kind != "c":
            return real
        imaginary = self.along(along * 1j, {self.spread, size}, index)
        return complex(real[0], imaginary[0]), real[1] + imaginary[1]

    def along_random(self, rng: np.random.Generator) -> tuple[Array, float, float]:
        """Return a direction in which every finite element moves, the derivative, and its error."""
        size = np.minimum(np.abs(self.x), self.spread)
        size = np.where(np.isfinite(self.x), np.where(size == 0, self.spread, size), 0)
        direction = np.where(rng.random(self.x.shape) < 0.5, -size, size).astype(self.x.dtype)
        if self.x.dtype.kind == "c":
            direction = direction * rng.choice([1, 1j], self.x.shape)
        largest = float(np.max(size, initial=0.0))
        scales = {1.0, 0.1 / largest} if 0 < largest < 0.1 else {1.0}
        return direction, *self.along(direction, scales)

    def ignores(self, elements: Array) -> bool:
        """Whether elements have no effect on the results, given as booleans."""
        for value in (0.0, 1.0, -2.0):
            moved = np.where(elements, np.asarray(value, self.x.dtype), self.x)
            pairs = zip(self._results(moved), self.here, strict=True)
            if not all(np.array_equal(y, z) for y, z in pairs):
                return False
        return True

    def along(
        self, direction: Array, scales: set[float], index: Index | None = None
    ) -> tuple[float, float]:
        """Return the derivative along a direction, and its error; NaN if there is none.

        Differences have the errors of rounding, which fall with the step, and of truncation, which
        rise. From small steps on, the intervals of the estimates with their rounding errors are
        intersected, until one does not meet the others: truncation begins there. The estimate with
        the smallest rounding error up to there is returned.

        Parameters
        ----------
        direction : ndarray
            Of the array's shape; 0 where the array is not finite.
        scales : set of float
            The sizes at which the function may change.
        index : tuple of int, optional
            The only element that moves.
        """
        steps = self._steps(scales, index)
        tried = [self._estimate(direction, step, index) for step in steps]
        tried = [t for t in tried if math.isfinite(t[0])]
        if len(tried) < 3:
            return math.nan, math.inf
        # Roundings inside of the function may be larger than those of its results. Where they
        # rule, at the smallest steps, neighbours differ by them.
        inner = max(abs(a[0] - b[0]) * a[2] for a, b in pairwise(tried[:4]))
        if _has_kink(tried, inner):
            return math.nan, math.inf
        low, high, best = -math.inf, math.inf, (math.nan, math.inf)
        for estimate, noise, step, _ in tried:
            error = max(noise, 2 * inner / step, RESOLUTION * abs(estimate))
            low, high = max(low, estimate - error), min(high, estimate + error)
            if low > high:
                break
            if error <= best[1]:
                best = estimate, error
        return best

    def _steps(self, scales: set[float], index: Index | None) -> list[float]:
        finite = {s for s in (*scales, 1.0) if 0 < s < math.inf}
        eps = float(np.finfo(self.x.dtype).eps)
        size = float(abs(self.x[index])) if index is not None else 0.0
        least = max(min(finite) * 1e-6, size * eps * LEAST_ROUNDINGS, 1e-290)
        most = max(max(scales | {least}) * 0.1, 1e-2)
        count = math.ceil(1.5 * math.log10(max(most / least, 10.0))) + 1
        return [float(s) for s in np.geomspace(least, max(most, 10 * least), min(count, 24))]

    def _estimate(
        self, direction: Array, step: float, index: Index | None
    ) -> tuple[float, float, float, float]:
        """Return the central difference of fourth order, its rounding error, and the step.

        The last number is the difference of the two differences of first order.
        """
        total = size = bend = 0.0
        eps = float(np.finfo(self.x.dtype).eps)
        for weight, distance in ((8.0, 1.0), (-1.0, 2.0)):
            plus, minus = (self.x + sign * distance * step * direction for sign in (1.0, -1.0))
            # Division by the step that was taken after rounding, not by the one that was wanted.
            taken = step if index is None else float(abs(plus[index] - minus[index]) / distance / 2)
            if taken == 0:
                return math.nan, math.inf, step, 0.0
            ys, zs = self._results(plus), self._results(minus)
            total += weight * self._pair(ys, zs) / taken
            for y, z, here, c in zip(ys, zs, self.here, self.cotangents, strict=True):
                moved = (y != here) | (z != here)
                size += float(np.sum(np.where(moved, np.abs(c) * (np.abs(y) + np.abs(z)), 0)))
            if distance == 1.0:
                bend = (self._pair(ys, self.here) + self._pair(zs, self.here)) / taken
        if size == 0.0:  # nothing moved: the step is lost in rounding, or has no effect
            size = sum(
                float(np.sum(np.abs(c) * np.abs(y)))
                for c, y in zip(self.cotangents, self.here, strict=True)
            )
        return total / 12, 2 * eps * size / step, step, bend


def _has_kink(tried: list[tuple[float, float, float, float]], inner: float) -> bool:
    """Whether the slopes on both sides differ: their difference does not fall with the step."""
    (slope, noise, first, bend), (*_, later, other) = tried[0], tried[2]
    if abs(bend) <= 20 * (noise + inner / first):
        return False
    return abs(other) < abs(bend) * math.sqrt(later / first) and abs(bend) > 1e-4 * abs(slope)


def _spread(a: Array) -> float:
    values = a[np.isfinite(a)]
    if values.size == 0:
        return 1.0
    largest = float(np.max(np.abs(values)))
    spread = float(np.std(values))
    return spread if spread > 1e-12 * largest else largest or 1.0
