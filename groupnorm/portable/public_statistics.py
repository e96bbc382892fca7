"""Convert statistics between the grouped shape and the public (N, num_groups) shape."""

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from groupnorm.adapter import library_of, not_an_array
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.plan import same_shape
from groupnorm.portable.complex_parts import real_part
from groupnorm.portable.inputs import check_same_library, from_numpy, is_floating
from groupnorm.portable.merge import GroupStatistics, merge
from groupnorm.typing import Array

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter
    from groupnorm.plan import Plan

__all__ = ["check_statistics", "from_value", "merge_values", "to_value"]

# Spreads within this factor of 1 need no unit: neither their squares, summed over 2**24 elements,
# nor those of their deviations leave float32's range.
_FACTOR = 2.0**40


def to_value(statistics: GroupStatistics, plan: "Plan", adapter: "Adapter") -> GroupStatistics:
    """Convert statistics from the grouped shape to the public one, the same for all layouts."""
    xp = adapter.xp
    at, ndim = plan.kept_before, len(plan.statistics_shape)
    groups_last = (*range(at), *range(at + 1, ndim), at)

    def field(a: Array) -> Array:
        a = xp.reshape(a, plan.groups_among_kept)
        return a if at == ndim - 1 else xp.permute_dims(a, groups_last)

    count = xp.ones_like(statistics.m2) * statistics.count
    return GroupStatistics(*map(field, _ordinary(statistics._replace(count=count), adapter)))


def _ordinary(statistics: GroupStatistics, adapter: "Adapter") -> GroupStatistics:
    """Make the unit 1 wherever the dtype allows, and round the mean to the nearest float."""
    xp = adapter.xp
    count, mean, m2, residual, unit = statistics
    # Non-finite data has no scale; the other fields are NaN already.
    unit = xp.where(unit > 0, unit, xp.ones_like(unit))
    extreme = (unit < 1 / _FACTOR) | (unit > _FACTOR)
    new = xp.where(extreme, unit, xp.ones_like(unit))
    ratio = new / unit
    rest = residual / unit
    rounded = mean + rest
    return GroupStatistics(count, rounded, m2 * ratio * ratio, ((mean - rounded) + rest) * new, new)


def from_value(
    statistics: GroupStatistics, x: Array, plan: "Plan", adapter: "Adapter", epsilon: float
) -> GroupStatistics:
    """Convert public statistics to the grouped shape and the dtype of `x`, in the work shape.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the statistics are of another library than x, or of other groups.
    """
    xp = adapter.xp
    check_statistics("statistics", statistics)
    at, ndim = plan.kept_before, len(plan.statistics_shape)
    groups_back = (*range(at), ndim - 1, *range(at, ndim - 1))
    real = adapter.real_dtype(x.dtype)

    def field(name: str) -> Array:
        return field_of(name, getattr(statistics, name))

    def field_of(name: str, value: Any) -> Array:
        a = _array(adapter, f"statistics.{name}", value, x, plan)
        a = a if at == ndim - 1 else xp.permute_dims(a, groups_back)
        a = a if is_floating(a.dtype, adapter) else xp.astype(a, real)
        return xp.reshape(a, plan.grouped_statistics_shape)

    given, lost_on_host = _rounded_on_host(statistics.mean, x)
    statistics = statistics._replace(mean=given)
    count = xp.astype(field("count"), real, copy=False)
    counted = count > 0
    # Empty groups have no mean; ignore the stored value.
    mean, m2, residual, unit = (
        xp.where(counted, field(name), neutral)
        for name, neutral in (("mean", 0.0), ("m2", 0.0), ("residual", 0.0), ("unit", 1.0))
    )
    for name, value in (("mean", mean), ("residual", residual)):
        _check_real(value, name, x, adapter)
    wide = mean
    mean, residual = (xp.astype(value, x.dtype, copy=False) for value in (mean, residual))
    m2, unit = (xp.astype(value, real, copy=False) for value in (m2, unit))
    unit = adapter.detach(unit)
    # Keep the rounding error of a mean in a wider dtype.
    if wide.dtype != x.dtype and is_floating(wide.dtype, adapter):
        rounded = mean if adapter.is_complex(wide.dtype) else real_part(mean, adapter)
        lost = wide - xp.astype(rounded, wide.dtype)
        residual = residual + xp.astype(lost, x.dtype) * unit
    if lost_on_host is not None:
        lost = field_of("mean", lost_on_host)
        residual = residual + xp.where(counted, xp.astype(lost, x.dtype, copy=False), 0.0) * unit
    if epsilon:
        # Spreads below sqrt(epsilon) need no separate scale, in which epsilon would overflow.
        most = xp.full_like(unit, epsilon**-0.5)
        new = xp.where(unit > most, most, unit)
        ratio = new / unit
        m2, residual, unit = m2 * ratio * ratio, residual * ratio, new
    return GroupStatistics(count, mean, m2, residual, unit)


def merge_values(adapter: "Adapter", statistics: Sequence[GroupStatistics]) -> GroupStatistics:
    """Merge public statistics of the same groups.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If their groups or libraries differ.
    """
    first, xp = statistics[0].mean, adapter.xp
    admitted = []
    for i, part in enumerate(statistics):
        if not adapter.is_array(part.mean):
            other = library_of(part.mean)
            if other is None:
                raise not_an_array(part.mean, f"statistics[{i}].mean")
            raise ArgumentTypeError(
                f"statistics[0] are of {adapter.array_name} and statistics[{i}] of "
                f"{other} arrays: arrays are not converted between libraries implicitly. Convert "
                "one, as in GroupStatistics(*map(numpy.asarray, statistics))."
            )
        mean = check_same_library(adapter, part.mean, f"statistics[{i}].mean", first)
        admitted.append(part._replace(mean=mean))
        if not same_shape(tuple(part.mean.shape), tuple(first.shape)):
            raise ArgumentValueError(
                f"statistics[{i}].mean has shape {tuple(part.mean.shape)} and statistics[0].mean "
                f"{tuple(first.shape)}: only statistics of the same groups of the same samples can "
                "be merged. Compute them with the same num_groups and axes."
            )
    given = [part.mean.dtype for part in statistics]
    floating = [d if is_floating(d, adapter) else adapter.default_float() for d in given]
    mean_dtype = adapter.result_type(*floating, xp.float32)
    dtypes = {"mean": mean_dtype, "residual": mean_dtype}  # the others are always real

    def stacked(name: str) -> Array:
        dtype = dtypes.get(name, adapter.real_dtype(mean_dtype))
        parts = []
        for part in admitted:
            value, zeros = getattr(part, name), xp.zeros_like(part.mean, dtype=dtype)
            number = isinstance(value, numbers.Number)
            if not number:
                value = xp.astype(adapter.admit(value, f"statistics.{name}"), dtype)
            parts.append(zeros + value)
        return xp.stack(parts)

    count, mean, m2, residual, unit = map(stacked, GroupStatistics._fields)
    # Empty groups have no mean; ignore the stored value.
    mean, m2, residual = (xp.where(count > 0, field, 0.0) for field in (mean, m2, residual))
    merged = merge(GroupStatistics(count, mean, m2, residual, unit), adapter, 0.0)
    return _ordinary(merged, adapter)


def check_statistics(argument: str, value: Any) -> None:
    """Reject an argument that is not a GroupStatistics."""
    if not isinstance(value, GroupStatistics):
        raise ArgumentTypeError(
            f"{argument} is of type {type(value).__name__}: it must be a GroupStatistics, "
            "from group_statistics or merge_statistics, or GroupStatistics(count, mean, m2)."
        )


def _check_real(value: Array, name: str, x: Array, adapter: "Adapter") -> None:
    if adapter.is_complex(value.dtype) and not adapter.is_complex(x.dtype):
        raise ArgumentTypeError(
            f"statistics.{name} is of {value.dtype} and x is real: these are statistics of other "
            "data. Pass statistics of real data."
        )


def _rounded_on_host(mean: Any, x: Array) -> tuple[Any, Any]:
    """Split a mean on the host into two floats; x's library may lack its wider dtype."""
    number = isinstance(mean, numbers.Number)
    name = str(x.dtype).rpartition(".")[2]
    if not (number or isinstance(mean, np.ndarray)) or name not in ("float32", "complex64"):
        return mean, None
    wide = np.asarray(mean)
    if wide.dtype.kind not in "fc" or wide.dtype.itemsize <= np.dtype(name).itemsize:
        return mean, None
    if wide.dtype.kind == "c" and name == "float32":
        return mean, None  # refused below
    with np.errstate(invalid="ignore", under="ignore"):
        rounded = wide.astype(name)
        lost = (wide - rounded).astype(name)
    return (rounded.item(), lost.item()) if number else (rounded, lost)


def _array(adapter: "Adapter", argument: str, value: Any, x: Array, plan: "Plan") -> Array:
    xp, shape = adapter.xp, plan.statistics_shape
    if isinstance(value, numbers.Number):
        if isinstance(value, complex) and not adapter.is_complex(x.dtype):
            raise ArgumentTypeError(
                f"{argument} is {value} and x is real: these are statistics of other data. Pass "
                "statistics of real data."
            )
        dtype = x.dtype if isinstance(value, complex) else adapter.real_dtype(x.dtype)
        return xp.full(shape, value, dtype=dtype, device=adapter.device_of(x))
    if isinstance(value, np.ndarray) and not adapter.is_array(value):
        value = from_numpy(adapter, value, argument, x)
    value = check_same_library(adapter, value, argument, x)
    if not same_shape(tuple(value.shape), shape):
        raise ArgumentValueError(
            f"{argument} has shape {tuple(value.shape)}, and for x of shape {plan.shape} it must "
            f"be {shape}: the axes that are not reduced, then the groups. Pass the same "
            "num_groups, feature_axis and reduction_axes to group_statistics and normalize."
        )
    return value
