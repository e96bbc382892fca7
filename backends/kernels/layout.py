"""Which calls kernels support, by axes and dtypes, and how they address an array in memory.

A call is supported if the data is real, statistics are not pooled over replicas, and the axes, in
memory order, are those the kernels support: samples, then channels and positions in either order.
For other calls the portable implementation is used, and the reason is reported.
"""

from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.kernels.variants import ACTIVATIONS, DTYPES
from groupnorm.plan import Plan, make_plan, product
from groupnorm.portable.inputs import dtypes_of

__all__ = [
    "ROLES",
    "KernelDtypes",
    "MemoryLayout",
    "flat_mask",
    "in_memory",
    "kernel_dtypes",
    "layout_of",
    "memory_order",
    "restored",
    "unflat_mask",
    "why_no_variant",
]

# The orders of axes that the kernels support; see `Plan.roles`.
ROLES = ("C", "CP", "PC", "KC", "KCP", "KPC")


class MemoryLayout(NamedTuple):
    """The memory layout of a call's arrays."""

    order: tuple[int, ...] | None  # the axes of x in memory order; None if it is x's own
    dense: bool  # whether x is stored in that order without gaps
    strides: tuple[int, ...]  # of x, in elements
    grouped: GroupedShape
    plan: Plan  # of the array in memory order
    shape: tuple[int, ...]  # of x
    feature_shape: tuple[int, ...]

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of parameters with a row for each sample; none if these are no batch."""
        if self.plan.kept_axes != {0} or (self.order is not None and self.order[0] != 0):
            return ()
        samples, channels = self.shape[0], self.grouped.channels
        return (samples, *self.feature_shape), (samples, channels)

    @property
    def inverse(self) -> tuple[int, ...]:
        """The permutation from memory order back to x's order."""
        order = self.order or ()
        return tuple(order.index(a) for a in range(len(order)))


class KernelDtypes(NamedTuple):
    """The dtypes of a call's arrays, by the names of `variants.DTYPES`."""

    x: str
    result: str
    result_dtype: Any  # the result's, as the library's object


class _Typed(NamedTuple):
    """Stand-in for an array of which only the dtype is needed."""

    dtype: Any


def kernel_dtypes(
    adapter: Any, x: Any, scale: Any, bias: Any, options: CallOptions
) -> KernelDtypes | Unsupported:
    """Return the kernels' dtypes for a call; a missing parameter's dtype is None."""
    # Constants from the host have NumPy dtypes, in any byte order.
    names: list[Any] = [None if d is None else _name(d) for d in (x, scale, bias)]
    if not all(n is None or n in DTYPES or n.startswith("float8") for n in names):
        parameters = ", ".join(n for n in names[1:] if n)
        return Unsupported(
            f"x of {names[0]}{parameters and f' with parameters of {parameters}'}: the kernels "
            "support the real floating dtypes float32, float16 and bfloat16"
        )
    typed: list[Any] = [None if n is None else _Typed(adapter.dtype(n)) for n in names]
    work, _, result = dtypes_of(adapter, typed[0], typed[1], typed[2], options)
    dtypes = KernelDtypes(names[0], _name(result), result)
    why = why_no_variant(dtypes.x, _name(work), dtypes.result, options.activation)
    return dtypes if why is None else why


def why_no_variant(x: str, work: str, result: str, activation: str | None) -> Unsupported | None:
    """Return why no kernel is compiled for dtypes of these names and this activation, or None."""
    if activation not in ACTIVATIONS:
        return Unsupported(f"the kernels have no activation {activation!r}")
    if work == "float32" and x in DTYPES and result in DTYPES:
        return None
    return Unsupported(
        f"x of {x} to a result of {result}, computed in {work}: the kernels support float32, "
        "float16 and bfloat16, computed in float32"
    )


def _name(dtype: Any) -> str:
    name: str = getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
    return name


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the axes from the slowest to the fastest if memory is dense, else None.

    Strides are in elements. That of an axis of length 1 may be any number; leading ones, such as
    the batch axis of one sample, stay in front.
    """
    own = tuple(range(len(shape)))
    if _dense(own, shape, strides):
        return own
    ones = next(a for a in own if shape[a] != 1)  # else it would be dense
    order = own[:ones] + tuple(sorted(own[ones:], key=lambda a: -strides[a]))
    return order if _dense(order, shape, strides) else None


def _order_with_gaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes from the slowest to the fastest; their own order if strides do not say.

    Results are stored in this order, so a part of a channels-last array stays channels-last.
    """
    own = tuple(range(len(shape)))
    if any(s <= 0 and n != 1 for n, s in zip(shape, strides, strict=True)):
        return own
    return tuple(sorted(own, key=lambda a: -strides[a]))


def _dense(order: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for axis in reversed(order):
        if shape[axis] != 1:
            if strides[axis] != expected:
                return False
            expected *= shape[axis]
    return True


def layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...], options: CallOptions
) -> MemoryLayout | Unsupported:
    """Return how kernels address an array of this shape and strides, or why they cannot.

    Raises
    ------
    ArgumentValueError
        If the axes do not fit the shape, or the channels the groups.
    """
    groups = (options.num_groups, options.group_size)
    plan = make_plan(
        shape, options.feature, *groups, options.reduction, options.feature_shape, sampled=False
    )
    if 0 in shape:
        return Unsupported("x has no elements")
    own = tuple(range(len(shape)))
    own_features = sorted(a % len(shape) for a in options.feature)
    stored = memory_order(shape, strides)
    features, reduced = own_features, own[:0]
    # An array with gaps is copied, so it may also be copied into the order of its own axes.
    for order in (stored,) if stored is not None else (_order_with_gaps(shape, strides), own):
        features = [order.index(a) for a in own_features]
        if features != sorted(features):  # parameters are in the order of x's axes
            order, features = own, own_features
        reduced = tuple(i for i, a in enumerate(order) if a not in plan.kept_axes)
        there = make_plan(
            tuple(shape[a] for a in order), tuple(features), *groups, reduced, None, sampled=False
        )
        roles = there.roles
        if there.permutation is None and roles in ROLES:
            break
    else:
        letters = ["C" if i in features else "P" if i in reduced else "K" for i in own]
        found = "".join(letter for letter, _ in groupby(letters))
        return Unsupported(
            "in memory, channels and positions must each be contiguous after the kept axes; here "
            f"the order is {found} (C channels, P positions, K kept axes). If the order of "
            f"x's axes is one of {', '.join(ROLES)}, pass a contiguous copy"
        )
    sizes = dict(zip(roles, there.merged_shape, strict=True))
    num_groups, group_size = there.parameter_shape[there.channel : there.channel + 2]
    return MemoryLayout(
        order=None if order == own else order,
        dense=order == stored,
        strides=tuple(strides),
        grouped=GroupedShape(
            samples=sizes.get("K", 1),
            groups=num_groups,
            group_size=group_size,
            positions=sizes.get("P", 1),
            channels_first=roles.endswith("CP"),
        ),
        plan=there,
        shape=shape,
        feature_shape=plan.feature_shape,
    )


def flat_mask(mask: Any, layout: MemoryLayout, xp: Any = np) -> Any:
    """Convert a boolean mask, an array of `xp`, to bytes: (1 or samples) * positions.

    Return `Unsupported` if it varies along the feature axes, or does not broadcast.
    """
    shape = layout.shape
    full = (1,) * (len(shape) - mask.ndim) + tuple(mask.shape)
    if len(full) > len(shape) or any(m not in (1, n) for m, n in zip(full, shape, strict=True)):
        return Unsupported("the mask does not broadcast to x")
    plan = layout.plan
    mask = xp.reshape(mask, full)
    if layout.order is not None:
        mask = xp.permute_dims(mask, layout.order)
    _, broadcast, work = plan.mask_shapes(tuple(mask.shape))
    at = slice(plan.channel, plan.channel + (1 if plan.two_stages else 2))
    if product(work[at]) != 1:
        return Unsupported("the mask varies along the feature axes")
    kept = plan.roles.count("K")
    rest = [*work[: at.start], *work[at.stop :]]
    samples = rest[0] if kept else 1
    positions = rest[-1] if len(rest) > kept else 1
    flat = xp.reshape(xp.broadcast_to(mask, broadcast), (samples, positions))
    flat = xp.reshape(xp.broadcast_to(flat, (samples, layout.grouped.positions)), (-1,))
    return xp.astype(flat, xp.uint8)  # a copy, so without gaps


def unflat_mask(flat: Any, layout: MemoryLayout) -> Any:
    """Convert what `flat_mask` returned, as booleans, back to a mask that broadcasts to x."""
    plan, grouped = layout.plan, layout.grouped
    features = plan.merged[plan.channel]
    alike = flat.shape[0] == grouped.positions
    shape = (
        1 if a in features or (alike and a in plan.kept_axes) else n
        for a, n in enumerate(plan.shape)
    )
    return restored(flat.reshape(tuple(shape)), layout)


def in_memory(a: Any, layout: MemoryLayout, library: Any) -> Any:
    """Return a NumPy or CuPy array, contiguous in x's memory order."""
    return library.ascontiguousarray(a if layout.order is None else a.transpose(layout.order))


def restored(a: Any, layout: MemoryLayout) -> Any:
    """Permute an array or tensor in memory order back to the order of x's axes."""
    if layout.order is None:
        return a
    return getattr(a, "permute", a.transpose)(layout.inverse)
