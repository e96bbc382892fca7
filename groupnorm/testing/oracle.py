"""The reference of group normalization and its gradients: float64, one group at a time.

Neither code nor method is shared with the rest of the library. The group of every element is
computed from its index, the elements of one group are gathered by fancy indexing, and the textbook
formula is applied to that list. Sums are exact (``math.fsum``), or 80-bit if a group is too large
for that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Gradients", "group_norm", "group_norm_gradients"]

Array = npt.NDArray[Any]
Axes = int | Sequence[int]

# math.fsum costs about 50 ns per element; above this size numpy's pairwise sum in long double is
# used, which is still three digits better than float64.
FSUM_LIMIT = 1 << 17


class Gradients(NamedTuple):
    """Cotangents of the input, the scale and the bias."""

    x: Array
    scale: Array | None
    bias: Array | None


@dataclass(frozen=True)
class Group:
    """One group: the positions of its elements, and the statistics of the valid ones."""

    where: tuple[Array, ...]
    valid: Array
    count: int
    rstd: float
    normalized: Array


def widen(a: npt.ArrayLike) -> Array:
    """Return `a` in float64, or complex128 if it is complex."""
    a = np.asarray(a)
    return a.astype(np.complex128 if a.dtype.kind == "c" else np.float64)


def exact_sum(values: Array) -> Any:
    """Sum a vector without intermediate rounding."""
    if values.dtype.kind == "c":
        return complex(exact_sum(np.real(values)), exact_sum(np.imag(values)))
    if values.size > FSUM_LIMIT or not np.isfinite(values).all():
        return float(values.astype(np.longdouble).sum())
    return math.fsum(values.tolist())


def as_axes(axes: Axes, ndim: int) -> list[int]:
    """Return `axes` as sorted non-negative ints."""
    listed = [axes] if isinstance(axes, int | np.integer) else list(axes)
    return sorted(int(axis) % ndim for axis in listed)


def default_reduction(ndim: int, features: list[int]) -> list[int]:
    """All axes but the batch axis; there is none if axis 0 is a feature axis or the only axis."""
    has_batch = ndim > 1 and 0 not in features
    return list(range(1 if has_batch else 0, ndim))


def channel_numbers(shape: tuple[int, ...], features: list[int]) -> Array:
    """Return every element's channel index: row-major over the feature axes in increasing order."""
    number: Array = np.zeros(shape, dtype=np.int64)
    index = np.indices(shape, sparse=True)
    for axis in features:
        number = number * shape[axis] + index[axis]
    return number


def positions_of_groups(
    shape: tuple[int, ...], features: list[int], reduced: list[int], num_groups: int
) -> list[Array]:
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


def measure(x: Array, valid: Array, where: tuple[Array, ...], epsilon: float) -> Group:
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


def prepare(
    x: npt.ArrayLike,
    mask: npt.ArrayLike | None,
    num_groups: int,
    group_size: int | None,
    feature_axis: Axes,
    reduction_axes: Axes | None,
) -> tuple[Array, Array, list[int], list[tuple[Array, ...]]]:
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


def parameter_numbers(
    parameter: npt.ArrayLike, shape: tuple[int, ...], features: list[int]
) -> Array:
    """Return the index into the flat parameter that belongs to every element.

    That of its channel; if the parameter has a row for each sample, (N, C), of that row's channel.
    """
    number, channels = channel_numbers(shape, features), math.prod(shape[a] for a in features)
    if np.size(parameter) != channels:
        assert np.size(parameter) == shape[0] * channels
        assert 0 not in features
        number = number + channels * np.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    return np.broadcast_to(number, shape)


def per_element(
    parameter: npt.ArrayLike | None, shape: tuple[int, ...], features: list[int], default: float
) -> Array:
    """Return the parameter of every element."""
    if parameter is None:
        return np.full(shape, default)
    flat: Array = widen(parameter).ravel()
    chosen: Array = flat[parameter_numbers(parameter, shape, features)]
    return chosen


def group_norm(
    x: npt.ArrayLike,
    scale: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    num_groups: int = 32,
    group_size: int | None = None,
    feature_axis: Axes = -1,
    reduction_axes: Axes | None = None,
    epsilon: float = 1e-6,
    mask: npt.ArrayLike | None = None,
) -> Array:
    """Return the normalized array, by the definition of group normalization.

    Parameters
    ----------
    x, scale, bias : array_like
        Of NumPy; any dtype, which is widened.
    num_groups, group_size, feature_axis, reduction_axes, epsilon, mask
        As for `groupnorm.group_norm`.

    Returns
    -------
    ndarray
        In float64, or complex128 if an argument is complex; of the shape of `x`.

    References
    ----------
    Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm.testing import oracle
    >>> oracle.group_norm(np.array([[1.0, 3.0, 5.0, 5.0]]), num_groups=2, epsilon=0)
    array([[-1.,  1.,  0.,  0.]])
    """
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
    x: npt.ArrayLike,
    dy: npt.ArrayLike,
    scale: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    num_groups: int = 32,
    group_size: int | None = None,
    feature_axis: Axes = -1,
    reduction_axes: Axes | None = None,
    epsilon: float = 1e-6,
    mask: npt.ArrayLike | None = None,
) -> Gradients:
    """Return the gradients of ``sum(Re(conj(dy) * y))``, dL/dRe + i dL/dIm for complex arrays.

    With h = conj(scale) * dy, and sums over ALL elements of the group (masked-out elements are
    normalized by the same statistics, so they contribute to their gradients) divided by the number
    n of valid elements:
    p = sum(h) / n, q = Re sum(conj(h) * xhat) / n, dx = rstd * (h - m * (p + xhat * q)).
    A masked-out non-finite input is replaced by the constant 0, so its gradient is 0.

    Parameters
    ----------
    x, scale, bias : array_like
    dy : array_like
        The cotangent of the result, of the shape of `x`.
    num_groups, group_size, feature_axis, reduction_axes, epsilon, mask
        As for `group_norm`.

    Returns
    -------
    Gradients
        In float64 or complex128; None for a parameter that was not given.

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm.testing import oracle
    >>> x = np.array([[1.0, 3.0, 5.0, 6.0]])
    >>> found = oracle.group_norm_gradients(x, np.ones((1, 4)), num_groups=2)
    >>> float(abs(found.x).max())  # a constant cotangent moves the mean alone
    0.0
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
            q = exact_sum(np.real(np.conj(hg) * xhat)) / group.count
            hg = hg - group.valid * (p + xhat * q)
        dx[where] = group.rstd * hg
        dscale[where] = np.conj(xhat) * dy[where]
    dx = np.where(valid | np.isfinite(given), dx, 0)
    if given.dtype.kind != "c":
        dx = np.real(dx)
    return Gradients(
        dx,
        None if scale is None else sum_by_entry(dscale, features, scale),
        None if bias is None else sum_by_entry(dy, features, bias),
    )


def sum_by_entry(values: Array, features: list[int], parameter: npt.ArrayLike) -> Array:
    """Sum over all elements of each entry of the parameter, in its shape; real if it is real."""
    parameter = np.asarray(parameter)
    number = parameter_numbers(parameter, values.shape, features)
    flat: Array = np.zeros(parameter.size, dtype=values.dtype)
    for entry in range(parameter.size):
        flat[entry] = exact_sum(values[number == entry])
    flat = flat.reshape(parameter.shape)
    return flat if parameter.dtype.kind == "c" else np.real(flat)
