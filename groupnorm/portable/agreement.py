"""Check that all ranks exchange statistics of the same signature, before they do."""

from typing import TYPE_CHECKING

from groupnorm.distributed.replicas import IndexGroups, Replicas, Signature, checksum
from groupnorm.errors import ArgumentValueError, AxisNameError

if TYPE_CHECKING:
    from groupnorm.typing import Array

__all__ = ["agree"]

# The number of leading sizes compared by value; a checksum compares all of them.
_SIZES = 4


def agree(
    statistics_shape: tuple[int, ...],
    like: "Array",
    replicas: Replicas,
    groups: IndexGroups,
) -> Replicas:
    """Check that all ranks exchange statistics of the same signature, before they do.

    Else the engine would abort the process, hang, or combine unrelated values. The check costs one
    collective for each communicator, the first time it is used with these arguments.

    Returns
    -------
    Replicas
        With the signature, which is sent along with every exchange.

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
    # Stored with all communicators pooled over: agreement over some of them is not enough.
    agreed = replicas.engines[0].agreement.signatures
    known = (signature, tuple(engine.agreement.number for engine in replicas.engines))
    if known in agreed:
        return signed
    sizes = (*statistics_shape, *(0,) * _SIZES)[:_SIZES]
    # A row of fixed length, whatever the ranks disagree on.
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
            "one that contains all ranks."
        )
    rows = [row[1:] for row in table]
    if any(row != rows[0] for row in rows):
        raise ArgumentValueError(_disagreement(rows, replicas.index, signature))
    agreed.add(known)
    return signed


# The dtypes of statistics; all others share one code.
_DTYPES = ("float32", "float64", "complex64", "complex128", "longdouble", "clongdouble")


def _code(dtype: str) -> int:
    return _DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES)


def _disagreement(rows: list[list[int]], rank: int, signature: Signature) -> str:
    statistics_shape, dtype, groups = signature
    other = next(i for i, row in enumerate(rows) if row != rows[rank])
    mine, theirs = rows[rank], rows[other]
    if mine[: _SIZES + 2] != theirs[: _SIZES + 2]:
        other_shape = tuple(theirs[1 : 1 + theirs[0]]) if theirs[0] <= _SIZES else "another shape"
        return (
            f"x has statistics of shape {statistics_shape} (the axes that are not reduced, then "
            f"the groups) on rank {rank} and {other_shape} on rank {other}: the ranks of axis_name "
            "hold parts of the same groups, so only reduced axes may differ in length. Give all "
            "ranks the same batch, num_groups and feature axes."
        )
    if mine[-1] != theirs[-1]:
        return (
            f"axis_index_groups={groups} on rank {rank} differs from that of rank {other}: all "
            "ranks must split the axis in the same way. Pass the same groups everywhere."
        )
    other_dtype = (*_DTYPES, "another dtype")[theirs[-2]]
    return (
        f"x, or a parameter, has another dtype on rank {rank} than on rank {other}: statistics are "
        f"computed in {dtype} and in {other_dtype}, and cannot be pooled. Convert one of them."
    )
