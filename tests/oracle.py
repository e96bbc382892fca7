"""The reference: group normalization and its gradients in float64, one group at a time.

Neither code nor method is shared with the library. The group of every element is computed from its
index, the elements of one group are gathered by fancy indexing, and the textbook formula is applied
to that list. Sums are exact (``math.fsum``), or 80-bit if a group is too large for that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# math.fsum costs about 50 ns per element; above this size numpy's pairwise sum in long double is
# used, which is still three digits better than float64.
FSUM_LIMIT = 1 << 17


class Gradients(NamedTuple):
    """Cotangents of the input, the scale and the bias."""

    x: np.ndarray
    scale: np.ndarray | None
    bias: np.ndarray | None


class Group(NamedTuple):
    """One group: the positions of its elements, and the statistics of the valid ones."""

    where: tuple[np.ndarray, ...]
    valid: np.ndarray
    count: int
    rstd: float
    normalized: np.ndarray


def widen(a) -> np.ndarray:
    """Return `a` in float64, or complex128 if it is complex."""
    a = np.asarray(a)
    return a.astype(np.complex128 if a.dtype.kind == "c" else np.float64)


def exact_sum(values: np.ndarray):
    """Sum a vector without intermediate rounding."""
    if values.dtype.kind == "c":
        return complex(exact_sum(values.real), exact_sum(values.imag))
    if values.size > FSUM_LIMIT or not np.isfinite(values).all():
        return float(values.astype(np.longdouble).sum())
    return math.fsum(values.tolist())


def as_axes(axes, ndim: int) -> list[int]:
    """Return `axes` as sorted non-negative ints."""
    listed = [axes] if isinstance(axes, (int, np.integer)) else list(axes)
    return sorted(int(axis) % ndim for axis in listed)


def default_reduction(ndim: int, features: list[int]) -> list[int]:
    """All axes but the batch axis; there is none if axis 0 is a feature axis or the only axis."""
    has_batch = ndim > 1 and 0 not in features
    return list(range(1 if has_batch else 0, ndim))


def channel_numbers(shape: tuple[int, ...], features: list[int]) -> np.ndarray:
    """Return every element's channel index: row-major over the feature axes in increasing order."""
    number = np.zeros(shape, dtype=np.int64)
    index = np.indices(shape, sparse=True)
    for axis in features:
        number = number * shape[axis] + index[axis]
    return number


def positions_of_groups(shape, features, reduced, num_groups) -> list[np.ndarray]:
    """Return the flat positions of the elements of every group."""
    channels = math.prod(shape[axis] for axis in features)
    assert channels % num_groups == 0
    key = channel_numbers(shape, features) // (channels // num_groups)
    index = np.indices(shape, sparse=True)
    for axis in range(len(shape)):
        if axis not in reduced:
            key = key * shape[axis] + index[axis]
    key = np.broadcast_to(key, shape).ravel()
    if key.size and (key == key[0]).all():
        return [np.arange(key.size)]
    order = np.argsort(key, kind="stable")
    ends = np.flatnonzero(np.diff(key[order])) + 1
    return [part for part in np.split(order, ends) if part.size]


def measure(x: np.ndarray, valid: np.ndarray, where, epsilon: float) -> Group:
    """Normalize the elements of one group."""
    values, valid = x[where], valid[where]
    counted = values[valid]
    count = counted.size
    if count == 0:
        mean, var = 0.0, 1.0
    else:
        mean = exact_sum(counted) / count
        deviation = counted - mean
        # Remove the rounding error of the mean itself.
        correction = exact_sum(deviation) / count
        mean, deviation = mean + correction, deviation - correction
        var = exact_sum(deviation.real**2 + deviation.imag**2) / count
    if (values[valid] == mean).all() and count:
        # A constant group; epsilon = 0 would give 0 * inf.
        rstd = math.inf if epsilon == 0 else 1 / math.sqrt(epsilon)
        normalized = np.where(valid, 0, (values - mean) * (rstd if epsilon else 0.0))
    else:
        rstd = 1 / math.sqrt(var + epsilon)
        normalized = (values - mean) * rstd
    return Group(where, valid, count, rstd, normalized)


def prepare(x, mask, num_groups, group_size, feature_axis, reduction_axes):
    """Return x in float64 with masked-out non-finite values zeroed, the mask, axes and groups."""
    x = widen(x)
    valid = np.ones(x.shape, dtype=bool)
    if mask is not None:
        valid = np.broadcast_to(np.asarray(mask) != 0, x.shape)
    x = np.where(~valid & ~np.isfinite(x), 0, x)
    features = as_axes(feature_axis, x.ndim)
    reduced = (
        default_reduction(x.ndim, features)
        if reduction_axes is None
        else as_axes(reduction_axes, x.ndim)
    )
    if group_size is not None:
        num_groups = math.prod(x.shape[axis] for axis in features) // group_size
    groups = positions_of_groups(x.shape, features, reduced, num_groups)
    wheres = [np.unravel_index(flat, x.shape) for flat in groups]
    return x, valid, features, wheres


def per_element(parameter, shape, features, default):
    """Return the parameter of every element's channel."""
    if parameter is None:
        return np.full(shape, default)
    flat = widen(parameter).ravel()
    return flat[np.broadcast_to(channel_numbers(shape, features), shape)]


def group_norm(
    x,
    scale=None,
    bias=None,
    *,
    num_groups=32,
    group_size=None,
    feature_axis=-1,
    reduction_axes=None,
    epsilon=1e-6,
    mask=None,
) -> np.ndarray:
    """Return the normalized array in float64 (complex128)."""
    x, valid, features, wheres = prepare(
        x, mask, num_groups, group_size, feature_axis, reduction_axes
    )
    scales = per_element(scale, x.shape, features, 1.0)
    biases = per_element(bias, x.shape, features, 0.0)
    y = np.zeros(x.shape, dtype=np.result_type(x, scales, biases))
    for where in wheres:
        group = measure(x, valid, where, epsilon)
        y[where] = group.normalized * scales[where] + biases[where]
    return y


def group_norm_gradients(
    x,
    dy,
    scale=None,
    bias=None,
    *,
    num_groups=32,
    group_size=None,
    feature_axis=-1,
    reduction_axes=None,
    epsilon=1e-6,
    mask=None,
) -> Gradients:
    """Return the gradients of ``sum(Re(conj(dy) * y))``, dL/dRe + i dL/dIm for complex arrays.

    With h = conj(scale) * dy, and sums over ALL elements of the group (masked-out elements are
    normalized by the same statistics, so they contribute to their gradients) divided by the number
    n of valid elements:
    p = sum(h) / n, q = Re sum(conj(h) * xhat) / n, dx = rstd * (h - m * (p + xhat * q)).
    A masked-out non-finite input is replaced by the constant 0, so its gradient is 0.
    """
    given, dy = widen(x), widen(dy)
    x, valid, features, wheres = prepare(
        x, mask, num_groups, group_size, feature_axis, reduction_axes
    )
    scales = per_element(scale, x.shape, features, 1.0)
    h = np.conj(scales) * dy
    dx = np.zeros(x.shape, dtype=np.result_type(x, h))
    dscale = np.zeros(x.shape, dtype=np.result_type(x, dy))
    for where in wheres:
        group = measure(x, valid, where, epsilon)
        hg, xhat = h[where], group.normalized
        if group.count:
            p = exact_sum(hg) / group.count
            q = exact_sum((np.conj(hg) * xhat).real) / group.count
            hg = hg - group.valid * (p + xhat * q)
        dx[where] = group.rstd * hg
        dscale[where] = np.conj(xhat) * dy[where]
    dx = np.where(valid | np.isfinite(given), dx, 0)
    if given.dtype.kind != "c":
        dx = dx.real
    number = np.broadcast_to(channel_numbers(x.shape, features), x.shape)
    return Gradients(
        dx,
        None if scale is None else sum_by_channel(dscale, number, scale),
        None if bias is None else sum_by_channel(dy, number, bias),
    )


def sum_by_channel(values, number, parameter) -> np.ndarray:
    """Sum over all elements of each channel, in the shape of the parameter; real if it is real."""
    parameter = np.asarray(parameter)
    flat = np.zeros(parameter.size, dtype=values.dtype)
    for channel in range(parameter.size):
        flat[channel] = exact_sum(values[number == channel])
    flat = flat.reshape(parameter.shape)
    return flat if parameter.dtype.kind == "c" else flat.real
