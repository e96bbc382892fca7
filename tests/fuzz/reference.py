"""The reference in extended precision, and the error allowed at every element.

It shares no code and no method with the library: elements are gathered by their group's number, and
the textbook formula is applied in ``long double`` (64 bits of precision and no overflow on x86),
with the mean as a pair, so that neither an offset nor the size of the data costs digits. It agrees
with `groupnorm.testing.oracle`, which sums exactly but holds values in float64.

The bounds are those of the accuracy contract, each relative to the terms that were rounded: an
output to its normalized value (or its group's spread, if that is larger), a gradient to the
magnitudes of the terms that are added up in it. Where an activation follows, its derivative carries
the error of what it is applied to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from groupnorm.testing.oracle import as_axes, channel_numbers, default_reduction
from tests.fuzz.arrays import Values
from tests.fuzz.cases import COMPLEX, HALF, Case
from tests.rows import CONTRACT, GRADIENT, GRADIENT_FAR, host_dtype

# The second derivative of an activation is at most this, and the first at most 1.13.
CURVATURE = {None: 0.0, "relu": 0.0, "silu": 0.5, "gelu": 0.8}
STEEPEST = 1.13

_erfc = np.frompyfunc(math.erfc, 1, 1)


class Expected(NamedTuple):
    """An array's values, the error allowed at each, and where there is nothing to compare."""

    values: np.ndarray
    allowed: np.ndarray
    undefined: np.ndarray


class Reference(NamedTuple):
    y: Expected
    x: Expected
    scale: Expected | None
    bias: Expected | None
    exact: np.ndarray  # where y is exactly the bias, before the activation
    kinks: np.ndarray  # where the sign of relu's argument is a matter of rounding
    extreme: bool  # whether terms of dx leave the dtype's range, if only where they are masked out


def widen(a: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "c":
        return a.astype(np.clongdouble)
    return a.astype(np.float64 if a.dtype.kind == "V" else np.longdouble).astype(np.longdouble)


def _abs2(a):
    return a.real**2 + a.imag**2 if a.dtype.kind == "c" else a * a


class _Groups:
    """The elements of an array in rows, one for each group."""

    def __init__(self, case: Case) -> None:
        shape, features = case.shape, case.features
        reduced = (
            default_reduction(len(shape), features)
            if case.reduction_axes is None
            else as_axes(case.reduction_axes, len(shape))
        )
        groups = case.num_groups or case.channels // case.group_size
        self.shape = shape
        self.channel = np.broadcast_to(channel_numbers(shape, features), shape)
        key = self.channel // (case.channels // groups)
        index = np.indices(shape, sparse=True)
        self.entry = self.channel  # of a parameter
        if case.per_sample:
            self.entry = self.channel + case.channels * index[0]
        for axis in range(len(shape)):
            if axis not in reduced:
                key = key * shape[axis] + index[axis]
        flat = np.broadcast_to(key, shape).ravel()
        self.order = np.argsort(flat, kind="stable")
        count = len(np.unique(flat))  # all have the same size
        self.rows = (count, flat.size // count if count else 0)

    def gather(self, a: np.ndarray) -> np.ndarray:
        return np.broadcast_to(a, self.shape).ravel()[self.order].reshape(self.rows)

    def scatter(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty(rows.size, rows.dtype)
        out[self.order] = rows.ravel()
        return out.reshape(self.shape)

    def of_elements(self, parameter: np.ndarray | None, default: float) -> np.ndarray:
        if parameter is None:
            return np.full(self.rows, np.longdouble(default))
        return self.gather(widen(parameter).ravel()[self.entry])

    def per_entry(self, rows: np.ndarray, like: np.ndarray) -> np.ndarray:
        out = np.zeros(like.size, rows.dtype)
        np.add.at(out, self.gather(self.entry).ravel(), rows.ravel())
        return out.reshape(like.shape)


def _activation(z: np.ndarray, name: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the activation and its derivative."""
    if name is None:
        return z, np.ones_like(z)
    if name == "relu":
        return np.maximum(z, 0), (z > 0).astype(z.dtype)
    if name == "silu":
        with np.errstate(over="ignore"):
            s = 1 / (1 + np.exp(-z))
        return z * s, s * (1 + z * (1 - s))
    cdf = 0.5 * _erfc(-z.astype(np.float64) / math.sqrt(2)).astype(np.longdouble)
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.longdouble(math.pi))
    return z * cdf, cdf + z * density


def compute(case: Case, values: Values) -> Reference:
    """Return the reference of a case: results, gradients, and the errors that are allowed."""
    groups = _Groups(case)
    unit = float(np.finfo(case.work).eps / np.finfo(np.float32).eps)
    forward = CONTRACT * unit
    far = case.offset >= 1e3 or case.values == "channel means"
    backward = (GRADIENT_FAR if far else GRADIENT) * unit

    given = groups.gather(widen(values.x))
    valid, huge = groups.gather(values.valid), groups.gather(values.huge)
    replaced = ~valid & ~np.isfinite(given)
    x = np.where(replaced | huge, 0, given)
    n = valid.sum(axis=1, keepdims=True)
    enough = np.maximum(n, 1)
    inside = np.where(valid, x, 0)
    mean = inside.sum(axis=1, keepdims=True) / enough
    deviation = x - mean
    deviation -= np.where(valid, deviation, 0).sum(axis=1, keepdims=True) / enough
    first = np.take_along_axis(x, valid.argmax(axis=1)[:, None], 1) if x.size else x[:, :1]
    constant = (~valid | (x == first)).all(axis=1, keepdims=True) & (n > 0)
    deviation = np.where(constant, x - first, deviation) if x.size else deviation
    variance = np.where(valid, _abs2(deviation), 0).sum(axis=1, keepdims=True) / enough
    deviation = np.where(n == 0, x, deviation)
    variance = np.where(n == 0, 1, variance)
    epsilon = np.longdouble(case.epsilon)
    degenerate = variance + epsilon == 0
    rstd = 1 / np.sqrt(np.where(degenerate, 1, variance + epsilon))
    xhat = deviation * rstd
    spread = np.sqrt(variance) * rstd  # of the normalized values; 1 but for epsilon

    scale, bias = groups.of_elements(values.scale, 1), groups.of_elements(values.bias, 0)
    z = xhat * scale + bias
    z_error = forward * (np.maximum(spread, abs(xhat)) * abs(scale) + abs(bias))
    y, slope = _activation(z, case.activation)
    tiny = 4 * float(np.finfo(case.work).smallest_normal)

    dy = groups.gather(widen(values.dy))
    kinks = (abs(z) <= z_error) & (case.activation == "relu")
    dy = np.where(kinks, 0, dy)
    dz = dy * slope
    # The magnitude of dz, which its rounding errors are relative to.
    size = abs(dy) * (1 if case.activation in (None, "relu") else 1 + abs(z))
    size = size + abs(dy) * CURVATURE[case.activation] * z_error / backward
    h, h_size = np.conj(scale) * dz, abs(scale) * size
    largest = np.where(valid, abs(xhat), 0).max(axis=1, keepdims=True, initial=0)
    rough = abs(xhat) + largest
    p = h.sum(axis=1, keepdims=True) / enough
    if case.dtype not in COMPLEX:
        p = p.real
    q = (np.conj(h) * xhat).real.sum(axis=1, keepdims=True) / enough
    counted = valid & (n > 0)
    dx = rstd * (h - np.where(counted, p + xhat * q, 0))
    p_size = h_size.sum(axis=1, keepdims=True) / enough
    q_size = (h_size * rough).sum(axis=1, keepdims=True) / enough
    dx_size = rstd * (h_size + np.where(counted, p_size + rough * q_size, 0))
    dx = np.where(replaced, 0, dx if case.dtype in COMPLEX else dx.real)

    far_out = dx_size > np.finfo(case.work).max / 64

    def expected(values, allowed, dtype, undefined=False):
        values = groups.scatter(values)
        allowed = groups.scatter(allowed)
        return _rounded(values, allowed, dtype, groups.scatter(np.broadcast_to(
            undefined, groups.rows)))  # fmt: skip

    def parameter(terms, sizes, like):
        if like is None:
            return None
        total = groups.per_entry(terms, like)
        if like.dtype.kind != "c":
            total = total.real
        sizes = groups.per_entry(sizes, like)
        return _rounded(total, backward * sizes + tiny, like.dtype.name, np.isinf(sizes))

    without = degenerate & ~valid
    any_degenerate = degenerate.any()
    result = Reference(
        expected(y, STEEPEST * z_error + tiny, case.result_dtype, huge | without),
        expected(dx, backward * dx_size + tiny, case.dtype, degenerate | far_out),
        parameter(np.conj(xhat) * dz, rough * size, values.scale),
        parameter(dz, size, values.bias),
        groups.scatter(constant & valid),
        groups.scatter(kinks),
        bool((rstd * (1 + rough) * (1 + q_size) > np.finfo(case.work).max / 64).any()),
    )
    if any_degenerate and result.scale is not None and without.any():
        # Masked-out elements of a constant group without an epsilon have no normalized value.
        result = result._replace(
            scale=result.scale._replace(undefined=np.ones_like(result.scale.undefined))
        )
    return result


def _rounded(values, allowed, dtype: str, undefined) -> Expected:
    """Allow for the rounding to a dtype that is narrower than the computation's.

    1.5 units in the last place: the contract's rounded result, within one unit more.
    """
    finest = np.finfo(host_dtype(dtype)) if dtype != "bfloat16" else _BFLOAT16
    exponent = np.frexp(np.maximum(abs(values), finest.smallest_normal))[1] - 1
    half = dtype in HALF
    allowed = allowed + (1.5 if half else 1) * np.ldexp(np.longdouble(finest.eps), exponent)
    # Out of the dtype's range, or on the edge.
    return Expected(values, allowed, undefined | (abs(values) + allowed > finest.max / 64))


class _BFLOAT16:
    eps, max, smallest_normal = 2.0**-7, 3.3895313892515355e38, 2.0**-126
