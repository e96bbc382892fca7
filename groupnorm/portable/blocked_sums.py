"""Sums whose error does not grow with their length, in a fixed order."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter
    from groupnorm.plan import Plan, Shape
    from groupnorm.typing import Array

__all__ = ["total", "total_of_products"]

# Sums longer than twice this are computed block by block: a running float32 sum of n terms has an
# error of about sqrt(n) roundings, and libraries split it differently. The size is fixed, so that
# the same call gives the same bits on every machine.
BLOCK = 256


def total(x: "Array", axes: "Shape", plan: "Plan", adapter: "Adapter") -> "Array":
    """Sum over `axes`, kept with length 1, in blocks of fixed size."""
    for axis in reversed(_summed(axes, x.shape, plan)):
        x = _sum((x,), axis, plan, adapter)
    return x


def total_of_products(
    a: "Array", b: "Array", axes: "Shape", plan: "Plan", adapter: "Adapter"
) -> "Array":
    """Sum a * b over `axes`, kept with length 1, in blocks of fixed size."""
    axes = _summed(axes, a.shape, plan)
    if not axes:
        return a * b
    return total(_sum((a, b), axes[-1], plan, adapter), axes[:-1], plan, adapter)


def _summed(axes: "Shape", shape: "Shape", plan: "Plan") -> "Shape":
    """Leave out axes of length 1, along which every row is a sum of one term."""
    return tuple(a for a in axes if not plan.static or shape[a] != 1)


def _sum(factors: "tuple[Array, ...]", axis: int, plan: "Plan", adapter: "Adapter") -> "Array":
    """Sum the product of the factors along one axis."""
    shape = factors[0].shape
    length = shape[axis]
    # A symbolic length may be any: always sum blocks, and the rest, which may be empty.
    symbolic = not isinstance(length, int)
    if not plan.blocked or (not symbolic and length <= 2 * BLOCK):
        return adapter.sum_of_product(factors, axis)
    xp = adapter.xp
    block = _block(length) if plan.static else BLOCK
    # Not divmod, which symbolic sizes lack.
    blocks, rest = length // block, length % block
    split = (*shape[:axis], blocks, block, *shape[axis + 1 :])
    partial_shape = (*shape[:axis], blocks, *shape[axis + 1 :])
    before = (slice(None),) * axis
    after = (slice(None),) * (len(shape) - axis - 1)
    head = tuple(
        xp.reshape(
            f[(*before, slice(None, blocks * block), *after)] if symbolic or rest else f, split
        )
        for f in factors
    )
    partial = xp.reshape(adapter.sum_of_product(head, axis + 1), partial_shape)
    result = (
        adapter.sum_of_product((partial,), axis)
        if symbolic
        else _sum((partial,), axis, plan, adapter)
    )
    if symbolic or rest:
        tail = tuple(f[(*before, slice(blocks * block, None), *after)] for f in factors)
        result = result + adapter.sum_of_product(tail, axis)
    return result


def _block(length: int) -> int:
    """Return the block size, preferably a divisor of the length, which leaves no remainder."""
    for distance in range(BLOCK // 2):
        for block in (BLOCK - distance, BLOCK + distance):
            if length % block == 0:
                return block
    return BLOCK
