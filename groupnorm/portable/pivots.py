"""The reference and the scale of deviations: detached, and exact for constant data."""

import math
import sys
from typing import TYPE_CHECKING, Any

from groupnorm.portable.blocked_sums import total
from groupnorm.portable.complex_parts import join, split

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter
    from groupnorm.plan import Plan
    from groupnorm.typing import Array

__all__ = ["at_least_rounding", "clip", "clip_real", "pivots", "unit_of"]

# That of extended precision is 0 as a float.
_SMALLEST = sys.float_info.min


def pivots(
    x: "Array", mask: "Array | None", count: "Array | float", plan: "Plan", adapter: "Adapter"
) -> tuple["Array", "Array", "Array"]:
    """Return a pivot near the mean of each inner reduction, and each group's minimum and maximum.

    All are in the grouped shape. The parts of complex data are processed separately.
    """
    parts = [_real_pivots(part, mask, count, plan, adapter) for part in split(x, adapter)]
    pivot, lowest, highest = (join(part, adapter) for part in zip(*parts, strict=True))
    return pivot, lowest, highest


def _real_pivots(
    x: "Array", mask: "Array | None", count: "Array | float", plan: "Plan", adapter: "Adapter"
) -> tuple["Array", "Array", "Array"]:
    xp = adapter.xp

    def grouped(value: "Array") -> "Array":
        return xp.reshape(value, plan.grouped(value.shape))

    if plan.empty:
        pivot = grouped(xp.sum(x, axis=plan.inner, keepdims=True))
        edge = xp.sum(pivot, axis=plan.members, keepdims=True)
        return pivot, edge, edge
    # Masked-out elements become the identity of min and max.
    above = x if mask is None else xp.where(mask, x, math.inf)
    below = x if mask is None else xp.where(mask, x, -math.inf)
    low = xp.min(above, axis=plan.inner, keepdims=True)
    high = xp.max(below, axis=plan.inner, keepdims=True)
    lowest = xp.min(grouped(low), axis=plan.members, keepdims=True)
    highest = xp.max(grouped(high), axis=plan.members, keepdims=True)
    if mask is None:
        pivot = low + total(x - low, plan.inner, plan, adapter) / count
        # Clipped, so that the pivot of equal elements is exactly their value.
        return grouped(clip_real(pivot, low, high, xp)), lowest, highest
    nothing, none_at_all = low > high, lowest > highest
    low, high = xp.where(nothing, 0.0, low), xp.where(nothing, 0.0, high)
    deviations = xp.where(mask, x - low, 0.0)
    pivot = clip_real(low + total(deviations, plan.inner, plan, adapter) / count, low, high, xp)
    # A channel without a valid element is normalized too. A value near the mean preserves accuracy:
    # the minimum of its group. If the group has no valid element either, the mean is 0.
    pivot = xp.where(grouped(nothing), xp.where(none_at_all, 0.0, lowest), grouped(pivot))
    # The spread of an empty group is defined as 1.
    return pivot, xp.where(none_at_all, 0.0, lowest), xp.where(none_at_all, 1.0, highest)


def at_least_rounding(
    spread: "Array", size: "Array", epsilon: float, adapter: "Adapter"
) -> "Array":
    """Return the spread of a sample, or that of other values that are rounded as the sample's are.

    Of a constant sample of this size: values that differ from it do so by a rounding at least, and
    huge ones by so much that their squares would overflow in the scale of epsilon.
    """
    xp, info = adapter.xp, adapter.xp.finfo(spread.dtype)
    # The square of epsilon's root in this scale must not vanish.
    most = math.sqrt(epsilon / float(info.smallest_normal)) / 8.0
    rounding = float(info.eps) * size
    rounding = xp.where(rounding > most, xp.full_like(rounding, most), rounding)
    return xp.where(spread < rounding, rounding, spread)


def unit_of(spread: "Array", epsilon: float, adapter: "Adapter") -> "Array":
    """Return a scale of the deviations that keeps their squares and epsilon in range."""
    xp = adapter.xp
    smallest = 4.0 * max(float(xp.finfo(spread.dtype).smallest_normal), _SMALLEST)
    if math.sqrt(epsilon) < smallest:  # the reciprocal of a subnormal spread would be infinite
        raised = (spread > 0) & (spread <= smallest)
        spread = xp.where(raised, xp.full_like(spread, 2.0 * smallest), spread)
    least = max(math.sqrt(epsilon), smallest)
    # For a constant group, or a constant sample of data with an unknown spread. An epsilon whose
    # root is subnormal is none: its reciprocal overflows.
    instead = least if 4.0 * math.sqrt(epsilon) >= smallest else 1.0
    return xp.ones_like(spread) / xp.where(spread > least, spread, xp.full_like(spread, instead))


def clip(x: "Array", low: "Array", high: "Array", adapter: "Adapter") -> "Array":
    """Clip x to [low, high], real and imaginary parts separately."""
    parts = zip(split(x, adapter), split(low, adapter), split(high, adapter), strict=True)
    return join([clip_real(*bounds, xp=adapter.xp) for bounds in parts], adapter)


def clip_real(x: "Array", low: "Array", high: "Array", xp: Any) -> "Array":
    """Clip x to [low, high]; NaN stays NaN."""
    return xp.where(x < low, low, xp.where(x > high, high, x))
