"""Statistics as values, and how those of parts become those of the whole."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from array_api_compat import array_namespace

from groupnorm.distributed.replicas import IndexGroups, Replicas
from groupnorm.portable.collectives import gather_checked
from groupnorm.portable.complex_parts import join, split
from groupnorm.portable.pivots import clip_real, unit_of
from groupnorm.typing import Array

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter


__all__ = ["GroupStatistics", "at_least_one", "merge", "merge_replicas"]


class GroupStatistics(NamedTuple):
    """How many elements a group has, their mean, and the sum of their squared deviations.

    `groupnorm.group_statistics` makes one, `groupnorm.merge_statistics` merges several,
    `groupnorm.normalize` applies it. As a named tuple of arrays it is a pytree in JAX and PyTorch.

    One float cannot hold a large mean to the accuracy of the deviations, and squares leave the
    range of a dtype before its values do: hence `residual` and `unit`.

    Parameters
    ----------
    count : array of shape (N, num_groups)
        Elements that were counted. In general the shape is that of the axes of x that are not
        reduced, in their order, and then the groups. In float32 exact up to 2**24, as integers are,
        and rounded beyond.
    mean : array of the same shape
        The mean, rounded.
    m2 : array of the same shape
        The sum of ``abs(x - mean)**2``, in units of ``unit**-2``.
    residual : array of the same shape
        What rounding left of the mean, in units of ``1 / unit``: the mean is
        ``mean + residual / unit``.
    unit : array of the same shape
        1, but for data that spreads over less than 1e-12 or more than 1e12.

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

    count: Array  # in place of the method tuples have
    mean: Array
    m2: Array
    residual: Array = 0.0
    unit: Array = 1.0

    @property
    def variance(self) -> "Array":
        """The biased variance; 1 where nothing was counted, as the layer takes it."""
        xp = array_namespace(self.m2)
        count = xp.ones_like(self.m2) * self.count
        variance = self.m2 / at_least_one(count, xp) / self.unit / self.unit
        return xp.where(count > 0, variance, xp.ones_like(variance))


def at_least_one(count: "Array", xp: Any) -> "Array":
    """Make a count safe to divide by: of what was not counted every sum is zero."""
    return xp.where(count > 0, count, xp.ones_like(count))


def merge_replicas(
    statistics: GroupStatistics,
    adapter: "Adapter",
    epsilon: float,
    replicas: Replicas,
    groups: IndexGroups,
) -> GroupStatistics:
    """Merge the statistics of all replicas, with their true counts, in one small collective.

    Every replica gets all of theirs and merges them in the same order, relative to a reference and
    a scale found then: a sum would need both before it is taken.
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
        What the variance will be added to at least: spreads below its root need no scale of their
        own.
    """
    xp = adapter.xp
    n, mean, m2, residual, unit = statistics
    means, residuals = split(mean, adapter), split(residual, adapter)
    valid = n > 0
    # Data that is not finite has no scale.
    unit = adapter.detach(xp.where(valid & (unit > 0), unit, 1.0))
    total = xp.sum(n, axis=0)
    count = at_least_one(total, xp)
    # One reference for all, near the mean. It is detached, and so the result does not depend on it.
    common = [_mean_within(adapter.detach(part), n, valid, count, xp) for part in means]
    off = [part - reference for part, reference in zip(means, common, strict=True)]
    # How far values lie from the reference. A part that is constant has a unit that says nothing.
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
    """Average over the leading axis; equal values average to exactly their value."""
    low = xp.min(xp.where(valid, x, math.inf), axis=0)
    high = xp.max(xp.where(valid, x, -math.inf), axis=0)
    nothing = low > high
    low, high = xp.where(nothing, 0.0, low), xp.where(nothing, 0.0, high)
    return clip_real(xp.sum(xp.where(valid, n * x, 0.0), axis=0) / count, low, high, xp)
