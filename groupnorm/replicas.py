"""Small arrays exchanged between replicas, in one collective: their sum, or everyone's own.

Every exchange is a sum over all replicas, which every library can differentiate. To keep sets of
replicas apart, or to keep each replica's own numbers, they are put in separate rows first. Unlike a
collective's own groups this works in every kind of map, needs no further communicators, and serves
sets of uneven size.
"""

import itertools
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from groupnorm.errors import ArgumentValueError

if TYPE_CHECKING:
    from groupnorm.backends import Adapter
    from groupnorm.typing import Array

__all__ = ["Replicas", "agree", "gather", "over_all", "pool"]

IndexGroups = tuple[tuple[int, ...], ...] | None


class Replicas(NamedTuple):
    """What a library knows of a named axis."""

    index: Any  # this replica's, an int or a scalar array
    size: int
    add: Callable[[Any], Any]  # sums an array over all replicas, differentiably
    #: The engine's own objects, where the replicas run programs of their own, which could disagree.
    communicators: tuple[Any, ...] = ()


def over_all(parts: Sequence[Replicas]) -> Replicas:
    """Put several axes together: the replicas of all, numbered in row-major order."""
    result = parts[0]
    for part in parts[1:]:
        result = _product(result, part)
    return result


def _product(a: Replicas, b: Replicas) -> Replicas:
    return Replicas(
        a.index * b.size + b.index,
        a.size * b.size,
        lambda x: b.add(a.add(x)),
        a.communicators + b.communicators,
    )


def pool(
    values: "tuple[Array, ...]", adapter: "Adapter", replicas: Replicas, groups: IndexGroups
) -> "tuple[Array, ...]":
    """Add equal-shaped arrays over the replicas, elementwise."""
    xp = adapter.xp
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
    values: "tuple[Array, ...]", adapter: "Adapter", replicas: Replicas, groups: IndexGroups
) -> "tuple[Array, ...]":
    """Return what every replica has of equal-shaped arrays, along a new leading axis.

    Rows of replicas outside this one's set hold zeros.
    """
    xp = adapter.xp
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


# Whether all ranks agree --------------------------------------------------------------------------

# What the ranks of a communicator have agreed on. All of them have seen the same, since every call
# involves all; the numbers tell communicators apart, and unlike ids are not used twice.
_agreed: "weakref.WeakKeyDictionary[Any, tuple[int, set[Any]]]" = weakref.WeakKeyDictionary()
_numbers = itertools.count()

# Sizes of the kept axes that are told apart by value; all of them are by checksum.
_SIZES = 4


def agree(
    statistics_shape: tuple[int, ...],
    like: "Array",
    adapter: "Adapter",
    replicas: Replicas,
    groups: IndexGroups,
) -> None:
    """Make sure that all ranks exchange the same kind of numbers, before they do.

    Else the engine would abort the process, wait for ever, or mix what does not belong together. It
    costs one collective, the first time a communicator meets these arguments.

    Raises
    ------
    ArgumentValueError
        On every rank, if the ranks disagree.
    """
    if not replicas.communicators:
        return
    dtype = str(like.dtype)
    entries = [_entry(communicator) for communicator in replicas.communicators]
    if any(entry is None for entry in entries):
        return
    numbers, sets = zip(*(entry for entry in entries if entry is not None), strict=True)
    signature = (numbers, statistics_shape, dtype, groups)
    if signature in sets[0]:
        return
    sizes = (*statistics_shape, *(0,) * _SIZES)[:_SIZES]
    mine = [len(statistics_shape), *sizes, *map(_checksum, (statistics_shape, dtype, groups))]
    rows = _everyones(mine, like, adapter, replicas)
    if any(row != rows[0] for row in rows):
        raise ArgumentValueError(_disagreement(rows, replicas.index, statistics_shape, groups))
    sets[0].add(signature)


def _entry(communicator: Any) -> tuple[int, set[Any]] | None:
    try:
        known = _agreed.get(communicator)
        if known is None:
            known = _agreed[communicator] = (next(_numbers), set())
    except TypeError:  # an engine whose communicators cannot be remembered
        return None
    return known


def _checksum(value: Any) -> int:
    return zlib.crc32(repr(value).encode()) % 2**24  # exact in float32


def _everyones(
    numbers: list[int], like: "Array", adapter: "Adapter", replicas: Replicas
) -> list[list[int]]:
    xp = adapter.xp
    # Always of one size and dtype, whatever the ranks disagree on.
    mine = xp.asarray(numbers, dtype=xp.float32, device=adapter.device_of(like))
    row = _row(replicas.index, replicas.size, mine, adapter)
    table = adapter.to_host(replicas.add(xp.where(row, mine[None, ...], 0.0)))
    return [[int(number) for number in row] for row in table]


def _disagreement(
    rows: list[list[int]], index: int, statistics_shape: tuple[int, ...], groups: IndexGroups
) -> str:
    other = next(i for i, row in enumerate(rows) if row != rows[index])
    mine, theirs = rows[index], rows[other]
    if mine[: _SIZES + 2] != theirs[: _SIZES + 2]:
        there = tuple(theirs[1 : 1 + theirs[0]]) if theirs[0] <= _SIZES else "another shape"
        return (
            f"x has statistics of shape {statistics_shape} (the axes that are not reduced, then "
            f"the groups) on rank {index} and {there} on rank {other}: the ranks of axis_name hold "
            "parts of the same groups, so only reduced axes may differ in length. Give all ranks "
            "the same batch, num_groups and feature axes."
        )
    if mine[-1] != theirs[-1]:
        return (
            f"axis_index_groups={groups} on rank {index} is not what rank {other} was given: all "
            "ranks split the axis in the same way. Pass the same groups everywhere."
        )
    return (
        f"x has another dtype on rank {index} than on rank {other}, and so have its statistics: "
        "convert it on one of them."
    )
