"""Sum or gather small arrays over replicas in one collective.

Every exchange is a sum over all replicas, which every library can differentiate. To keep sets of
replicas apart, or to keep the values of each replica, they are put in separate rows first. Unlike a
collective's own groups this works in every kind of map, needs no further communicators, and serves
sets of uneven size.
"""

from typing import TYPE_CHECKING, Any

from groupnorm.distributed.replicas import IndexGroups, Replicas
from groupnorm.errors import ArgumentValueError

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter
    from groupnorm.typing import Array

__all__ = ["gather", "gather_checked", "pool"]


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


def gather_checked(
    values: "tuple[Array, ...]", adapter: "Adapter", replicas: Replicas, groups: IndexGroups
) -> "tuple[Array, ...]":
    """`gather` values, of ranks that all take part with the same kind of statistics.

    `agree` has seen to that when a kind is new. Later, ranks may still meet with different kinds
    that all of them know; where these are as many numbers, no engine would notice.

    Raises
    ------
    ArgumentValueError
        On every rank, if they do not; where values cannot be looked at (while a program is traced,
        on a GPU without waiting for it), the first of the values becomes NaN instead.
    """
    signature = replicas.signature
    if signature is None:
        return gather(values, adapter, replicas, groups)
    xp = adapter.xp
    mine = xp.full_like(values[0], signature.code)
    *gathered, codes = gather((*values, mine), adapter, replicas, groups)
    other = (codes != 0) & (codes != mine)  # 0 is outside of this one's set
    if adapter.value_if_ready(xp.any(other)):
        rank = int(xp.argmax(xp.astype(xp.reshape(other, (replicas.size, -1))[:, 0], xp.uint8)))
        raise ArgumentValueError(
            f"x has statistics of shape {signature.statistics_shape} (the axes that are not "
            f"reduced, then the groups), of {signature.dtype}, on rank {replicas.index}, and rank "
            f"{rank} exchanges others in the same call: all ranks must make the same calls in the "
            "same order. Give all the same batch and num_groups in each."
        )
    return xp.where(other, xp.full_like(codes, float("nan")), gathered[0]), *gathered[1:]
