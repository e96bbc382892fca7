"""NCCL communicators: sums over ranks, for CuPy arrays."""

from typing import Any

import cupy

from groupnorm.distributed.replicas import Agreement, Engine, Replicas
from groupnorm.errors import AxisNameError

__all__ = ["replicas_of"]

# Communicators are kept with what their ranks agreed on: they cannot be referred to weakly, and an
# id must not come to mean another one.
_agreements: dict[int, tuple[Any, Agreement]] = {}


def replicas_of(communicator: Any) -> Replicas:
    """Find the ranks of a communicator of NCCL, bare or cupyx.distributed's.

    Raises
    ------
    AxisNameError
        If it is none.
    """
    # cupyx.distributed wraps one; NCCL itself is asked, so that both go the same way.
    library = getattr(communicator, "_comm", communicator)
    if not hasattr(library, "allReduce"):
        raise AxisNameError(
            f"axis_name={communicator!r} is a {type(communicator).__name__}: for CuPy arrays "
            "the replicas are a cupy.cuda.nccl.NcclCommunicator, what "
            "cupyx.distributed.init_process_group returns, or a name bound to one of them by "
            "groupnorm.bind_axis."
        )

    def add(x: Any) -> Any:
        # In C order: NCCL adds what lies in memory, and would mix other orders up.
        x = cupy.ascontiguousarray(x)
        total = cupy.empty(x.shape, x.dtype, order="C")
        nccl: Any = cupy.cuda.nccl  # holds nothing where the library is missing
        kind = {"f": nccl.NCCL_FLOAT32, "d": nccl.NCCL_FLOAT64}[x.dtype.char]
        stream = cupy.cuda.get_current_stream().ptr
        library.allReduce(x.data.ptr, total.data.ptr, x.size, kind, nccl.NCCL_SUM, stream)
        return total

    rank, size = library.rank_id(), library.size()

    def add_table(table: list[list[int]], like: Any) -> list[list[int]]:
        total = cupy.asnumpy(add(cupy.asarray(table, dtype=cupy.float64)))  # exact up to 2**53
        return [[int(number) for number in row] for row in total]

    _, agreement = _agreements.setdefault(id(library), (library, Agreement()))
    return Replicas(rank, size, add, (Engine(add_table, agreement),))
