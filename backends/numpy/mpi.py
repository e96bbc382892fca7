"""MPI communicators: sums over ranks, for NumPy arrays."""

from typing import Any

import numpy as np

from groupnorm.distributed.replicas import Agreement, Engine, Replicas
from groupnorm.errors import AxisNameError

__all__ = ["replicas_of"]


def replicas_of(communicator: Any) -> Replicas:
    """Return the ranks of an mpi4py communicator.

    Raises
    ------
    AxisNameError
        If it is not a communicator, or this rank is not a member.
    """
    # Recognized by its methods, so that mpi4py need not be imported here.
    known = hasattr(communicator, "Allreduce")
    if known and not communicator:
        raise AxisNameError(
            "axis_name is MPI.COMM_NULL: this rank is not a member of the group. Call the layer "
            "on the group's members only."
        )
    if not known or communicator.is_inter:
        raise AxisNameError(
            f"axis_name={communicator!r} is a {type(communicator).__name__}: for NumPy arrays "
            "it must be an mpi4py.MPI.Intracomm, such as MPI.COMM_WORLD, or a name bound to one by "
            "groupnorm.bind_axis."
        )

    def add(x: Any) -> Any:
        # MPI reads the memory in order, so it must be contiguous.
        total = np.empty(x.shape, x.dtype)
        communicator.Allreduce(np.ascontiguousarray(x), total)
        return total

    rank, size = communicator.Get_rank(), communicator.Get_size()

    def add_table(table: list[list[int]], like: Any) -> list[list[int]]:
        rows: list[list[int]] = add(np.asarray(table, np.int64)).tolist()
        return rows

    return Replicas(rank, size, add, (Engine(add_table, _agreement(communicator)),))


_keyval: list[int] = []


def _agreement(communicator: Any) -> Agreement:
    """Return the ranks' `Agreement`, which is stored as an attribute of the MPI communicator.

    Python may have several handles of one communicator, and they cannot be hashed.
    """
    if not _keyval:
        _keyval.append(type(communicator).Create_keyval())
    agreed: Agreement | None = communicator.Get_attr(_keyval[0])
    if agreed is None:
        agreed = Agreement()
        communicator.Set_attr(_keyval[0], agreed)
    return agreed
