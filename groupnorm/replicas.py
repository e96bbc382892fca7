"""Small arrays exchanged between replicas, in one collective: their sum, or everyone's own.

Every exchange is a sum over all replicas, which every library can differentiate. To keep sets of
replicas apart, or to keep each replica's own numbers, they are put in separate rows first. Unlike a
collective's own groups this works in every kind of map, needs no further communicators, and serves
sets of uneven size.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from groupnorm.errors import ArgumentValueError, AxisNameError

if TYPE_CHECKING:
    from groupnorm.backends import Adapter
    from groupnorm.typing import Array

__all__ = [
    "Agreement",
    "Engine",
    "Replicas",
    "Signature",
    "agree",
    "gather_alike",
    "over_all",
    "pool",
]

IndexGroups = tuple[tuple[int, ...], ...] | None


class Agreement:
    """What the ranks of a communicator have agreed on: all the same, as every call involves all."""

    def __init__(self) -> None:
        self.number = next(_numbers)  # unlike an id never used again
        self.signatures: set[Any] = set()


_numbers = itertools.count()


class Engine(NamedTuple):
    """Ranks that run programs of their own, which could disagree."""

    #: Sums a table of integers over all ranks; `like` says on which device.
    add: "Callable[[list[list[int]], Array], list[list[int]]]"
    agreement: Agreement


class Signature(NamedTuple):
    """What all ranks must have the same of."""

    statistics_shape: tuple[int, ...]
    dtype: str
    groups: "IndexGroups"

    @property
    def code(self) -> float:
        """A number other than 0 that float32 holds exactly and that others hardly have."""
        return float(1 + _checksum(tuple(self)) % (1 << 23))


class Replicas(NamedTuple):
    """What a library knows of a named axis."""

    index: Any  # this replica's, an int or a scalar array
    size: int
    add: Callable[[Any], Any]  # sums an array over all replicas, differentiably
    engines: tuple[Engine, ...] = ()
    #: What kind of statistics this replica takes part with, where others could differ.
    signature: "Signature | None" = None


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
        a.engines + b.engines,
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


def gather_alike(
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
    if adapter.known(xp.any(other)):
        rank = int(xp.argmax(xp.astype(xp.reshape(other, (replicas.size, -1))[:, 0], xp.uint8)))
        raise ArgumentValueError(
            f"x has statistics of shape {signature.statistics_shape} (the axes that are not "
            f"reduced, then the groups), of {signature.dtype}, on rank {replicas.index}, and rank "
            f"{rank} exchanges others in the same call: all ranks must make the same calls in the "
            "same order. Give all the same batch and num_groups in each."
        )
    return xp.where(other, xp.full_like(codes, float("nan")), gathered[0]), *gathered[1:]


# Whether all ranks agree --------------------------------------------------------------------------

# Sizes of the kept axes that are told apart by value; all of them are by checksum.
_SIZES = 4


def agree(
    statistics_shape: tuple[int, ...],
    like: "Array",
    replicas: Replicas,
    groups: IndexGroups,
) -> Replicas:
    """Make sure that all ranks exchange the same kind of numbers, before they do.

    Else the engine would abort the process, wait for ever, or mix what does not belong together. It
    costs one collective for each communicator, the first time they meet these arguments.

    Returns
    -------
    Replicas
        With the signature that every exchange carries.

    Raises
    ------
    ArgumentValueError
        On every rank, if the ranks disagree.
    """
    if not replicas.engines:
        return replicas
    dtype = str(like.dtype).rpartition(".")[2]
    signature = Signature(statistics_shape, dtype, groups)
    signed = replicas._replace(signature=signature)
    # Kept with all the communicators pooled over: what some have agreed on, others may not know.
    agreed = replicas.engines[0].agreement.signatures
    known = (signature, tuple(engine.agreement.number for engine in replicas.engines))
    if known in agreed:
        return signed
    sizes = (*statistics_shape, *(0,) * _SIZES)[:_SIZES]
    # Always as many numbers, whatever the ranks disagree on.
    mine = [1, len(statistics_shape), *sizes, _checksum(statistics_shape), _code(dtype)]
    mine.append(_checksum(groups))
    table = [[0] * len(mine) for _ in range(replicas.size)]
    table[replicas.index] = mine
    for engine in replicas.engines:
        table = engine.add(table, like)
    if any(row[0] != 1 for row in table):
        raise AxisNameError(
            f"axis_name names {len(replicas.engines)} communicators that reach a rank more than "
            "once, or not at all: several must be the dimensions of a grid. Give each once, or the "
            "one that holds all ranks."
        )
    rows = [row[1:] for row in table]
    if any(row != rows[0] for row in rows):
        raise ArgumentValueError(_disagreement(rows, replicas.index, signature))
    agreed.add(known)
    return signed


# What statistics are computed in; others are as good as unknown.
_DTYPES = ("float32", "float64", "complex64", "complex128", "longdouble", "clongdouble")


def _code(dtype: str) -> int:
    return _DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES)


def _checksum(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


def _disagreement(rows: list[list[int]], rank: int, signature: Signature) -> str:
    statistics_shape, dtype, groups = signature
    other = next(i for i, row in enumerate(rows) if row != rows[rank])
    mine, theirs = rows[rank], rows[other]
    if mine[: _SIZES + 2] != theirs[: _SIZES + 2]:
        there = tuple(theirs[1 : 1 + theirs[0]]) if theirs[0] <= _SIZES else "another shape"
        return (
            f"x has statistics of shape {statistics_shape} (the axes that are not reduced, then "
            f"the groups) on rank {rank} and {there} on rank {other}: the ranks of axis_name hold "
            "parts of the same groups, so only reduced axes may differ in length. Give all ranks "
            "the same batch, num_groups and feature axes."
        )
    if mine[-1] != theirs[-1]:
        return (
            f"axis_index_groups={groups} on rank {rank} is not what rank {other} was given: all "
            "ranks split the axis in the same way. Pass the same groups everywhere."
        )
    there = (*_DTYPES, "another dtype")[theirs[-2]]
    return (
        f"x, or a parameter, has another dtype on rank {rank} than on rank {other}: statistics are "
        f"computed in {dtype} here and {there} there, and cannot be pooled. Convert one of them."
    )
