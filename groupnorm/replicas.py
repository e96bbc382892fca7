"""Small arrays exchanged between replicas, in one collective: their sum, or everyone's own.

Every exchange is a sum over all replicas, which every library can differentiate. To keep sets of
replicas apart, or to keep each replica's own numbers, they are put in separate rows first. Unlike a
collective's own groups this works in every kind of map, and for sets of uneven size.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from groupnorm.errors import ArgumentValueError

if TYPE_CHECKING:
    from groupnorm.backends import Adapter
    from groupnorm.typing import Array

__all__ = ["Replicas", "gather", "pool"]

IndexGroups = tuple[tuple[int, ...], ...] | None


class Replicas(NamedTuple):
    """What a library knows of a named axis."""

    index: Any  # this replica's, an int or a scalar array
    size: int
    add: Callable[[Any], Any]  # sums an array over all replicas, differentiably


def pool(
    values: "tuple[Array, ...]", adapter: "Adapter", axis_name: Any, groups: IndexGroups
) -> "tuple[Array, ...]":
    """Add equal-shaped arrays over the replicas, elementwise."""
    xp = adapter.xp
    replicas = adapter.replicas(axis_name)
    packed = xp.stack(values)
    if groups is None:
        pooled = replicas.add(packed)
    else:
        table = _group_of(groups, replicas.size)
        mine = xp.asarray(table, device=adapter.device_of(packed))[replicas.index]
        row = _row(mine, len(groups), packed, adapter)
        sums = replicas.add(xp.where(row, packed[None, ...], 0.0))
        pooled = xp.sum(xp.where(row, sums, 0.0), axis=0)
    return tuple(pooled[i, ...] for i in range(len(values)))


def gather(
    values: "tuple[Array, ...]", adapter: "Adapter", axis_name: Any, groups: IndexGroups
) -> "tuple[Array, ...]":
    """Return what every replica has of equal-shaped arrays, along a new leading axis.

    Rows of replicas outside this one's set hold zeros.
    """
    xp = adapter.xp
    replicas = adapter.replicas(axis_name)
    packed = xp.stack(values)
    row = _row(replicas.index, replicas.size, packed, adapter)
    rows = replicas.add(xp.where(row, packed[None, ...], 0.0))
    if groups is not None:
        group_of = _group_of(groups, replicas.size)
        table = [[mine == other for other in group_of] for mine in group_of]
        together = xp.asarray(table, device=adapter.device_of(packed))[replicas.index]
        rows = xp.where(xp.reshape(together, (replicas.size,) + (1,) * packed.ndim), rows, 0.0)
    return tuple(rows[:, i, ...] for i in range(len(values)))


def _row(index: Any, rows: int, packed: "Array", adapter: "Adapter") -> "Array":
    """True in one of `rows` rows. Chosen by where: a product would spread a NaN to all rows."""
    numbers = adapter.xp.arange(rows, device=adapter.device_of(packed))
    return adapter.xp.reshape(numbers == index, (rows,) + (1,) * packed.ndim)


def _group_of(groups: tuple[tuple[int, ...], ...], size: int) -> list[int]:
    members = sorted(i for group in groups for i in group)
    if members != list(range(size)):
        raise ArgumentValueError(
            f"axis_index_groups={groups} does not hold every index of an axis of size {size} "
            f"exactly once: each replica belongs to one group. Split 0 ... {size - 1}."
        )
    return [next(g for g, group in enumerate(groups) if i in group) for i in range(size)]
