"""`GroupStatistics`, and merging the statistics of several parts."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from array_api_compat import array_namespace

from groupnorm.adapter import library_of, not_an_array
from groupnorm.distributed.replicas import IndexGroups, Replicas
from groupnorm.portable.collectives import gather_checked
from groupnorm.portable.complex_parts import join, split
from groupnorm.portable.pivots import clip_real, unit_of
from groupnorm.typing import Array

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter


__all__ = ["GroupStatistics", "at_least_one", "merge", "merge_replicas"]


class GroupStatistics(NamedTuple):
    """The number of elements of each group, their mean, and the sum of squared deviations.

    `groupnorm.group_statistics` computes it, `groupnorm.merge_statistics` merges several, and
    `groupnorm.normalize` applies it. As a named tuple of arrays it is a pytree in JAX and PyTorch.

    A single float cannot represent a large mean to the accuracy of the deviations, and squares
    overflow or underflow before the values do: hence `residual` and `unit`.

    Parameters
    ----------
    count : array of shape (N, num_groups)
        The number of valid elements. In general the shape is that of the axes of x that are not
        reduced, in their order, followed by the groups. In float32 counts are exact up to 2**24,
        and rounded beyond.
    mean : array of the same shape
        The mean, rounded.
    m2 : array of the same shape
        The sum of ``abs(x - mean)**2``, in units of ``unit**-2``.
    residual : array of the same shape
        The rounding error of the mean, in units of ``1 / unit``: the exact mean is
        ``mean + residual / unit``.
    unit : array of the same shape
        1, except for data with a spread below 1e-12 or above 1e12.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for computing the sample
       variance", The American Statistician 37 (1983), 242-247.

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import group_statistics
    >>> statistics = group_statistics(np.array([[1.0, 3.0, 10.0, 10.0]]), num_groups=2)
    >>> statistics.mean
    array([[ 2., 10.]])
    >>> statistics.variance
    array([[1., 0.]])
    """

    count: Array  # shadows `tuple.count`
    mean: Array
    m2: Array
    residual: Array = 0.0
    unit: Array = 1.0

    @property
    def variance(self) -> "Array":
        """The biased variance; 1 for groups without valid elements, as in the layer."""
        if library_of(self.m2) is None:
            raise not_an_array(self.m2, "m2")
        xp = array_namespace(self.m2)
        count = xp.ones_like(self.m2) * self.count
        variance = self.m2 / at_least_one(count, xp) / self.unit / self.unit
        return xp.where(count > 0, variance, xp.ones_like(variance))


def at_least_one(count: "Array", xp: Any) -> "Array":
    """Replace zero counts by 1 so that they can divide: the sums of empty groups are 0."""
    return xp.where(count > 0, count, xp.ones_like(count))


def merge_replicas(
    statistics: GroupStatistics,
    adapter: "Adapter",
    epsilon: float,
    replicas: Replicas,
    groups: IndexGroups,
) -> GroupStatistics:
    """Merge the statistics of all replicas, weighted by their counts, in one small collective.

    Every replica gathers all statistics and merges them in the same order. A plain sum would need
    a common reference and scale beforehand.
    """
    count, mean, m2, residual, unit = statistics
    count = adapter.xp.ones_like(m2) * count
    means, residuals = split(mean, adapter), split(residual, adapter)
    values = (m2, count, unit, *means, *residuals)
    m2, count, unit, *parts = gather_checked(values, adapter, replicas, groups)
    stacked = GroupStatistics(
        count,
        join(parts[: len(means)], adapter),
        m2,
        join(parts[len(means) :], adapter),
        unit,
    )
    return merge(stacked, adapter, epsilon)


def merge(statistics: GroupStatistics, adapter: "Adapter", epsilon: float) -> GroupStatistics:
    """Merge along the leading axis, by the formula of Chan, Golub and LeVeque.

    Parameters
    ----------
    epsilon : float
        The smallest constant that will be added to the variance: spreads below its square root
        need no separate scale.
    """
    xp = adapter.xp
    n, mean, m2, residual, unit = statistics
    means, residuals = split(mean, adapter), split(residual, adapter)
    valid = n > 0
    # Non-finite data has no scale.
    unit = adapter.detach(xp.where(valid & (unit > 0), unit, 1.0))
    total = xp.sum(n, axis=0)
    count = at_least_one(total, xp)
    # A common reference near the mean. The result does not depend on it, so it can be detached.
    common = [_mean_within(adapter.detach(part), n, valid, count, xp) for part in means]
    off = [part - reference for part, reference in zip(means, common, strict=True)]
    # The distance of the values from the reference. The unit of a constant part is meaningless.
    reach = xp.where(m2 > 0, 1.0 / unit, 0.0)
    for part, residual_part in zip(off, residuals, strict=True):
        reach = reach + xp.abs(part) + xp.abs(residual_part) / unit
    reach = adapter.detach(reach)
    common_unit = unit_of(xp.max(xp.where(valid, reach, 0.0), axis=0), epsilon, adapter)
    ratio = common_unit / unit
    deviations = [o * common_unit + r * ratio for o, r in zip(off, residuals, strict=True)]
    centres = [xp.sum(n * part, axis=0) / count for part in deviations]
    m2 = m2 * ratio * ratio
    for part, centre in zip(deviations, centres, strict=True):
        m2 = m2 + n * (part - centre) * (part - centre)
    return GroupStatistics(
        total,
        join(common, adapter),
        xp.sum(m2, axis=0),
        join(centres, adapter),
        common_unit,
    )


def _mean_within(x: "Array", n: "Array", valid: "Array", count: "Array", xp: Any) -> "Array":
    """Average over the leading axis; the mean of equal values is exactly their value."""
    low = xp.min(xp.where(valid, x, math.inf), axis=0)
    high = xp.max(xp.where(valid, x, -math.inf), axis=0)
    nothing = low > high
    low, high = xp.where(nothing, 0.0, low), xp.where(nothing, 0.0, high)
    return clip_real(xp.sum(xp.where(valid, x * (n / count), 0.0), axis=0), low, high, xp)
