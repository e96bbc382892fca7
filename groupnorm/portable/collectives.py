"""Sum or gather small arrays over replicas in one collective.

Every exchange is a sum over all replicas, which every library can differentiate. To separate sets
of replicas, or to keep the values of each replica, they are written to separate rows first. Unlike
the collectives' own groups this works in every kind of map, needs no additional communicators, and
supports sets of unequal size.
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
    """Sum arrays of equal shape over the replicas, elementwise."""
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
    """Gather arrays of equal shape from all replicas, along a new leading axis.

    Rows of replicas outside this replica's set are zero.
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
    """True in one of `rows` rows. For `where`: a product would spread a NaN to all rows."""
    indices = adapter.xp.arange(rows, device=adapter.device_of(packed))
    return adapter.xp.reshape(indices == index, (rows,) + (1,) * packed.ndim)


def _group_of(groups: tuple[tuple[int, ...], ...], size: int) -> list[int]:
    members = sorted(i for group in groups for i in group)
    if members != list(range(size)):
        raise ArgumentValueError(
            f"axis_index_groups={groups} does not contain every index of an axis of size {size} "
            f"exactly once: each replica belongs to one group. Split 0 ... {size - 1}."
        )
    return [next(g for g, group in enumerate(groups) if i in group) for i in range(size)]


def gather_checked(
    values: "tuple[Array, ...]", adapter: "Adapter", replicas: Replicas, groups: IndexGroups
) -> "tuple[Array, ...]":
    """`gather` values, and check that all ranks exchange statistics of the same signature.

    `agree` checks each new signature once. Later, ranks may still call with different known
    signatures of equal size, which no engine would detect.

    Raises
    ------
    ArgumentValueError
        On every rank, if signatures differ. If values cannot be read (while a program is traced, or
        on a GPU without synchronization), the first of the values becomes NaN instead.
    """
    signature = replicas.signature
    if signature is None:
        return gather(values, adapter, replicas, groups)
    xp = adapter.xp
    mine = xp.full_like(values[0], signature.code)
    *gathered, codes = gather((*values, mine), adapter, replicas, groups)
    other = (codes != 0) & (codes != mine)  # 0 is outside this replica's set
    if adapter.value_if_ready(xp.any(other)):
        rank = int(xp.argmax(xp.astype(xp.reshape(other, (replicas.size, -1))[:, 0], xp.uint8)))
        raise ArgumentValueError(
            f"x has statistics of shape {signature.statistics_shape} (the axes that are not "
            f"reduced, then the groups), of {signature.dtype}, on rank {replicas.index}, and rank "
            f"{rank} exchanges others in the same call: all ranks must make the same calls in the "
            "same order. Give all ranks the same batch and num_groups in each call."
        )
    return xp.where(other, xp.full_like(codes, float("nan")), gathered[0]), *gathered[1:]
