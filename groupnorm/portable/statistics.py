"""The implementation: compute each group's count, mean and variance, and normalize.

Written once, in array API terms, for arrays in the work shape of a `Plan`. Arguments are already
validated; nothing here depends on the library.

Accuracy
--------
Sums run over deviations from a *pivot* `k` near the mean, never over raw values, so an offset of
the data costs no accuracy. With `u` a scale for the deviations (so that no square overflows or
underflows) and `d = (x - k) * u`, per channel::

    c  = sum(d) / n                      mean - pivot, scaled
    M2 = sum(|d|^2) - n |c|^2            little cancellation, since c is small

Channels are merged into groups, and groups over replicas, by the formula of Chan, Golub and LeVeque
relative to a reference near the mean of means. A mean therefore stays a pair, (reference, small
correction), and is applied as a pair: rounding it to one float would lose accuracy again.

Where values can be read (in NumPy), no pivot is subtracted from data whose means are near 0, which
saves a pass: the statistics themselves tell. Otherwise each group has one pivot, the mean of the
sample or of all, and what follows is only needed for constants, huge and tiny data and masks.

`use_fast_variance` only determines the pivot: the mean of a strided sample (the data is read once),
or the full mean (two passes). With a mask it is always the latter, because a sample may contain no
valid element at all; also without an epsilon, when a constant sample would give no scale, and under
torch.compile, which traces with symbolic sizes.

Pivots, references and scales carry no gradient. The result does not depend on them, so gradients
of any order are still exact.

References
----------
.. [1] Y. Wu and K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494
.. [2] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for computing the sample variance",
   The American Statistician 37 (1983), 242-247.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from groupnorm.plan import product
from groupnorm.portable.blocked_sums import total, total_of_products
from groupnorm.portable.complex_parts import abs2, join, magnitude, split
from groupnorm.portable.merge import GroupStatistics, at_least_one
from groupnorm.portable.pivots import at_least_rounding, clip, pivots, unit_of

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter
    from groupnorm.plan import Plan
    from groupnorm.typing import Array

__all__ = [
    "Coefficients",
    "Deviations",
    "centre",
    "centre_at",
    "finish",
    "measure",
    "normalize",
    "recentre",
    "saturate",
]


# Deviations whose unit is within this factor of 1 need no scaling: neither their squares nor those
# of outliers, a million times as large, leave the range of float32.
ORDINARY = 2.0**20
# With a mean square of at most this multiple of the variance, in every group, a pivot of 0 is as
# accurate as any other, that is, with a mean of at most half a standard deviation.
NEAR = 1.25


class Deviations(NamedTuple):
    """The data relative to its pivots."""

    values: "Array"  # (x - pivot) * unit, in the work shape; with a mask x - pivot until `saturate`
    pivot: "Array"  # per channel (or, in one stage, per group), in the grouped shape
    unit: "Array"  # the scale of the deviations, shaped as the pivot
    scaled: bool  # False if the unit is known to be 1 everywhere


class Coefficients(NamedTuple):
    """Coefficients of the normalization: ``deviations * gain - shift``."""

    gain: "Array"
    shift: "Array"
    rstd: "Array"  # 1 / sqrt(var + epsilon), per group
    inv_count: "Array | float"  # 1 / n, and 0 for groups without a valid element


def measure(
    x: "Array",
    mask: "Array | None",
    plan: "Plan",
    adapter: "Adapter",
    epsilon: float,
) -> tuple[GroupStatistics, Deviations]:
    """Compute the statistics of every group of `x`.

    Parameters
    ----------
    x : array
        In the work shape and in the dtype of the statistics; finite wherever masked out.
    mask : boolean array or None
        Valid elements, broadcastable to the work shape.

    Returns
    -------
    GroupStatistics
        In the grouped shape; of this array alone, not pooled over replicas.
    Deviations
        The deviations that were summed. With a mask, call `saturate` before using them.
    """
    xp = adapter.xp
    if adapter.reads_values and mask is None and not plan.empty:
        with np.errstate(over="ignore", invalid="ignore"):  # then it is measured below
            found = _measure_directly(x, plan, adapter)
        if found is not None:
            return found
    counts: Array | float = adapter.count_of(plan.inner_count, x)
    enough: Array | float
    if counts is plan.inner_count:
        enough = max(plan.inner_count, 1)
    else:
        enough = at_least_one(counts, xp)
    if mask is not None:
        counts = _counts(mask, plan, x, adapter)
        enough = at_least_one(counts, xp)
    still, seen = adapter.detach(x), enough
    if plan.sample is not None:  # implies that there is no mask
        still = still[plan.sample]
        seen = float(product(still.shape[a] for a in plan.inner))
    pivot, lowest, highest = pivots(still, mask, seen, plan, adapter)
    spread = magnitude(highest - lowest, adapter)
    if plan.sample is not None:
        spread = at_least_rounding(spread, magnitude(highest, adapter), epsilon, adapter)
    group_unit = unit_of(spread, epsilon, adapter)
    scaled = not (adapter.reads_values and _is_ordinary(group_unit, ORDINARY, xp))
    if not scaled:
        group_unit = xp.ones_like(group_unit)
    # Expanded to the pivot's shape: an operand broadcast within its rows costs NumPy tenfold.
    unit = group_unit * xp.ones_like(magnitude(pivot, adapter))
    pivot, unit = adapter.materialize(pivot, unit)

    centred = _centre(x, pivot, unit, plan, adapter, scaled=scaled)
    valid = centred.values if mask is None else xp.where(mask, centred.values, 0.0)
    if scaled:
        factor = xp.reshape(unit, plan.ungrouped(unit.shape))
        if adapter.overwrites:
            valid *= factor
        else:
            valid = valid * factor
        centred = centred if mask is not None else centred._replace(values=valid)
    delta = total(valid, plan.inner, plan, adapter) / enough
    m2 = _total_abs2(valid, plan, adapter) - counts * abs2(delta, adapter)
    if not plan.two_stages:
        return GroupStatistics(counts, pivot, m2, delta, unit), centred

    weights = xp.ones_like(m2) * counts
    weights, delta, m2 = (xp.reshape(a, plan.grouped(a.shape)) for a in (weights, delta, m2))
    members = (plan.members,)
    count = total(weights, members, plan, adapter)
    enough = at_least_one(count, xp)
    # Clipped: rounding must not move the mean of equal pivots away from their common value. Divided
    # first: the sum of huge values would overflow.
    reference = clip(
        total(pivot * (weights / enough), members, plan, adapter), lowest, highest, adapter
    )
    means = (pivot - reference) * unit + delta
    mean = total(weights * means, members, plan, adapter) / enough
    m2 = total(m2 + weights * abs2(means - mean, adapter), members, plan, adapter)
    return GroupStatistics(count, reference, m2, mean, group_unit), centred


def _measure_directly(
    x: "Array", plan: "Plan", adapter: "Adapter"
) -> tuple[GroupStatistics, Deviations] | None:
    """Measure in few operations, for libraries whose values can be read; None if inaccurate.

    Each group has one pivot. It is 0 if that serves: then x itself is the deviations.
    """
    xp = adapter.xp
    sample = x if plan.sample is None else x[plan.sample]
    if product(sample.shape) > product(x.shape) / 8:  # gathering it takes longer than reading x
        sample = x
    elif sample is not x:
        sample = xp.asarray(sample, copy=True)
    moments = _moments(sample, plan, adapter)
    if moments is None:
        return None
    # One value per channel: loops run along whole rows.
    ones = xp.ones(plan.parameter_shape, dtype=moments.variance.dtype)
    pivot = xp.zeros_like(moments.mean) if moments.near else moments.mean
    unit = xp.ones_like(moments.variance)
    centred = Deviations(x, pivot * ones, unit * ones, scaled=False)
    if not moments.near:
        centred = _centre(x, centred.pivot, centred.unit, plan, adapter, scaled=False)
    if centred.values is not sample:
        moments = _moments(centred.values, plan, adapter)
        if moments is None or not moments.near:
            return None
    count = float(plan.group_count)
    return GroupStatistics(count, pivot, moments.variance * count, moments.mean, unit), centred


class _Moments(NamedTuple):
    mean: "Array"
    variance: "Array"
    near: bool  # whether a pivot of 0 is near enough to the mean of every group


def _moments(values: "Array", plan: "Plan", adapter: "Adapter") -> _Moments | None:
    """Return each group's mean and variance; None if a square may have left the dtype's range."""
    xp = adapter.xp
    sums, squares = total(values, plan.inner, plan, adapter), _total_abs2(values, plan, adapter)
    if plan.two_stages:
        sums, squares = (
            total(xp.reshape(a, plan.grouped(a.shape)), (plan.members,), plan, adapter)
            for a in (sums, squares)
        )
    count = float(product(values.shape) // product(sums.shape))
    mean, mean_square = sums / count, squares / count
    if not _is_ordinary(mean_square, ORDINARY**2, xp):
        return None
    variance = mean_square - abs2(mean, adapter)
    return _Moments(mean, variance, bool(xp.all(NEAR * variance >= mean_square)))


def _is_ordinary(values: "Array", limit: float, xp: Any) -> bool:
    """Whether all values are within a factor of 1: no deviation then needs scaling."""
    return bool(xp.all((values >= 1 / limit) & (values <= limit)))


def _centre(
    x: "Array", pivot: "Array", unit: "Array", plan: "Plan", adapter: "Adapter", *, scaled: bool
) -> Deviations:
    """Subtract the pivots; do not scale yet."""
    pivot_of_channel = adapter.xp.reshape(pivot, plan.ungrouped(pivot.shape))
    return Deviations(x - pivot_of_channel, pivot, unit, scaled)


def centre(
    x: "Array",
    mask: "Array | None",
    statistics: GroupStatistics,
    plan: "Plan",
    adapter: "Adapter",
) -> Deviations:
    """Centre x at given means, one per group. With a mask, call `saturate` before using them."""
    # One value per channel: loops run along whole rows, and the work shape has no group axis.
    unit = statistics.unit
    members = adapter.xp.ones(
        plan.parameter_shape, dtype=unit.dtype, device=adapter.device_of(unit)
    )
    pivot = adapter.detach(statistics.mean) * members
    return centre_at(x, mask, pivot, unit * members, plan, adapter)


def centre_at(
    x: "Array",
    mask: "Array | None",
    pivot: "Array",
    unit: "Array",
    plan: "Plan",
    adapter: "Adapter",
) -> Deviations:
    """Centre x at given pivots. With a mask, call `saturate` before using the deviations."""
    centred = _centre(x, pivot, unit, plan, adapter, scaled=True)
    return centred if mask is not None else _scale(centred, plan, adapter)


def recentre(
    x: "Array",
    centred: Deviations,
    local: GroupStatistics,
    merged: GroupStatistics,
    plan: "Plan",
    adapter: "Adapter",
) -> Deviations:
    """Centre groups whose valid elements are all on other replicas near their mean, with a mask."""
    pivot = adapter.xp.where(local.count > 0, centred.pivot, merged.mean)
    return _centre(x, pivot, centred.unit, plan, adapter, scaled=centred.scaled)


def _scale(centred: Deviations, plan: "Plan", adapter: "Adapter") -> Deviations:
    if not centred.scaled:
        return centred
    unit = adapter.xp.reshape(centred.unit, plan.ungrouped(centred.unit.shape))
    return centred._replace(values=centred.values * unit)


def saturate(
    centred: Deviations,
    mask: "Array",
    coefficients: "Coefficients",
    scale: "Array",
    plan: "Plan",
    adapter: "Adapter",
) -> Deviations:
    """Scale the deviations; bound masked-out ones, such as padding with the dtype's lowest value.

    Where one of their products with the unit, with 1 / sqrt(var + epsilon) or with the parameter
    overflowed, inf times a cotangent of 0 would make the gradients of whole channels NaN.
    """
    xp = adapter.xp
    unit, rstd = centred.unit, adapter.detach(coefficients.rstd)
    gain = adapter.detach(magnitude(scale, adapter))
    bound = 2.0**-16 * float(xp.finfo(unit.dtype).max)

    def limit_of(factor: "Array") -> "Array":
        least = 2.0**-14  # the limit itself must not overflow
        return bound / xp.where(factor < least, xp.full_like(factor, least), factor)

    limit = limit_of(unit)
    of_result = limit_of(rstd) / xp.where(gain > 1, gain, xp.ones_like(gain))
    limit = xp.where(limit > of_result, of_result, limit)
    limit = xp.reshape(limit, plan.ungrouped(limit.shape))
    parts = [
        xp.where(mask | (xp.abs(part) <= limit), part, xp.where(part > 0, limit, -limit))
        for part in split(centred.values, adapter)
    ]
    return _scale(centred._replace(values=join(parts, adapter)), plan, adapter)


def _counts(mask: "Array", plan: "Plan", x: "Array", adapter: "Adapter") -> "Array":
    """Count the valid elements; a broadcast inner axis of the mask multiplies by its length."""
    xp = adapter.xp
    real = adapter.real_dtype(x.dtype)
    counts = total(xp.astype(mask, real), plan.inner, plan, adapter)
    repeats = product(plan.work_shape[a] for a in plan.inner if mask.shape[a] == 1)
    return counts * (float(repeats) if plan.static else adapter.count_of(repeats, x))


def _total_abs2(x: "Array", plan: "Plan", adapter: "Adapter") -> "Array":
    """Sum |x|^2 over the inner axes."""
    real, *imaginary = split(x, adapter)
    sums = total_of_products(real, real, plan.inner, plan, adapter)
    for part in imaginary:
        sums = sums + total_of_products(part, part, plan.inner, plan, adapter)
    return sums


def finish(
    statistics: GroupStatistics,
    centred: Deviations,
    adapter: "Adapter",
    epsilon: float,
    *,
    may_be_empty: bool,
) -> Coefficients:
    """Compute the coefficients of the normalization from the statistics.

    Parameters
    ----------
    may_be_empty : bool
        Whether a group may have no valid element; then its mean is 0 and its variance 1.
    """
    xp = adapter.xp
    n, reference, m2, delta, unit = statistics
    enough = at_least_one(xp.ones_like(m2) * n, xp) if may_be_empty else n
    counted = xp.ones_like(m2) * n > 0 if may_be_empty else None
    if counted is not None:
        # The mean of an empty group is 0, whatever its reference.
        reference, delta = xp.where(counted, reference, 0.0), xp.where(counted, delta, 0.0)
    root = math.sqrt(epsilon) * unit
    # Rounding may leave a tiny negative value; with this order of operands NaN stays NaN.
    variance = xp.where(m2 < 0, xp.zeros_like(m2), m2) / enough + root * root
    # Without an epsilon the variance of a constant group is 0: any finite divisor will do.
    variance = xp.where(variance == 0, xp.ones_like(variance), variance)
    # A square beyond the sample's scale overflowed: return NaN, not zeros.
    variance = xp.where(variance == math.inf, xp.full_like(variance, math.nan), variance)
    # Of the scaled data: 1 / sqrt(var + epsilon) is infinite for subnormal data without an epsilon.
    inverse = bounded = 1.0 / xp.sqrt(variance)
    if epsilon < float(xp.finfo(unit.dtype).smallest_normal):  # only then can it be infinite
        limit = 0.5 * float(xp.finfo(unit.dtype).max) / xp.where(unit > 1, unit, 1.0)
        bounded = xp.where(inverse > limit, limit, inverse)
    rstd = unit * bounded
    inv_count: Array | float = 1.0 / enough
    if counted is not None:
        rstd = xp.where(counted, rstd, xp.full_like(rstd, 1.0 / math.sqrt(1.0 + epsilon)))
        inverse = xp.where(counted, inverse, rstd / unit)
        inv_count = xp.where(counted, inv_count, xp.zeros_like(m2))
    shift = ((reference - centred.pivot) * unit + delta) * inverse
    return Coefficients(inverse * (unit / centred.unit), shift, rstd, inv_count)


def normalize(
    centred: Deviations,
    coefficients: Coefficients,
    scale: "Array",
    bias: "Array",
    plan: "Plan",
    adapter: "Adapter",
    *,
    keep_deviations: bool,
) -> "Array":
    """Normalize: one multiply and one add per element, everything else is per channel.

    Parameters
    ----------
    keep_deviations : bool
        Whether the deviations are needed afterwards; else the result may overwrite them.
    """
    factor, term = adapter.materialize(coefficients.gain * scale, bias - coefficients.shift * scale)
    factor = adapter.xp.reshape(factor, plan.ungrouped(factor.shape))
    y = centred.values
    if keep_deviations or factor.dtype != y.dtype or not adapter.overwrites:
        y = y * factor
    else:
        y *= factor
    term = adapter.xp.reshape(term, plan.ungrouped(term.shape))
    if adapter.has_autograd:
        return y + term  # not in place: y may be less batched than the bias, under torch.vmap
    y += term
    return y
