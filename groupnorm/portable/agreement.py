"""Whether all ranks exchange the same kind of statistics, before they do."""

from typing import TYPE_CHECKING

from groupnorm.distributed.replicas import IndexGroups, Replicas, Signature, checksum
from groupnorm.errors import ArgumentValueError, AxisNameError

if TYPE_CHECKING:
    from groupnorm.typing import Array

__all__ = ["agree"]

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
    mine = [1, len(statistics_shape), *sizes, checksum(statistics_shape), _code(dtype)]
    mine.append(checksum(groups))
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
