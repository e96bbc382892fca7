"""NCCL communicators: sums over ranks, for CuPy arrays."""

from typing import Any

import cupy

from groupnorm.distributed.replicas import Agreement, Engine, Replicas
from groupnorm.errors import AxisNameError

__all__ = ["replicas_of"]

# Communicators are kept alive with their ranks' agreements: they do not support weak references,
# and an id must not be reused for another one.
_agreements: dict[int, tuple[Any, Agreement]] = {}


def replicas_of(communicator: Any) -> Replicas:
    """Return the ranks of an NCCL communicator, or of one of cupyx.distributed.

    Raises
    ------
    AxisNameError
        If it is neither.
    """
    # cupyx.distributed wraps one; NCCL is called directly, so that both behave the same.
    library = getattr(communicator, "_comm", communicator)
    if not hasattr(library, "allReduce"):
        raise AxisNameError(
            f"axis_name={communicator!r} is a {type(communicator).__name__}: for CuPy arrays "
            "it must be a cupy.cuda.nccl.NcclCommunicator, what "
            "cupyx.distributed.init_process_group returns, or a name bound to one of them by "
            "groupnorm.bind_axis."
        )

    def add(x: Any) -> Any:
        # In C order: NCCL adds memory elementwise, and ranks could have different orders.
        x = cupy.ascontiguousarray(x)
        total = cupy.empty(x.shape, x.dtype, order="C")
        nccl: Any = cupy.cuda.nccl  # an empty module if NCCL is missing
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
