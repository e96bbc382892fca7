"""Names for what statistics are pooled over, where the library has none of its own.

JAX names its mapped axes itself. For torch.distributed, MPI and NCCL a layer may hold the name of
a communicator instead of the communicator: then it can be copied, pickled and moved to another
backend, and the same code runs on every engine.
"""

import atexit
from typing import Any

from groupnorm.errors import ArgumentTypeError, ArgumentValueError, AxisNameError

__all__ = ["Binding", "bind_axis", "bound"]

# What each name was bound to, the latest last, and by whom. Of the whole process, not of one thread
# or context: autograd runs in threads of its own.
_bound: "dict[str, list[tuple[Binding, Any]]]" = {}
# A process group that is let go of later, with the modules, aborts the process (torch 2.13, gloo).
atexit.register(_bound.clear)


class Binding:
    """What `bind_axis` has bound; a context manager that takes it back at the end."""

    def __init__(self, names: dict[str, Any]) -> None:
        for name, communicator in names.items():
            _bound.setdefault(name, []).append((self, communicator))

    def unbind(self) -> None:
        """Take the names back: they stand for what they stood for before, if for anything."""
        for name, entries in list(_bound.items()):
            entries[:] = [entry for entry in entries if entry[0] is not self]
            if not entries:
                del _bound[name]

    def __enter__(self) -> "Binding":
        return self

    def __exit__(self, *exception: object) -> None:
        self.unbind()


def bind_axis(mesh: Any = None, /, **names: Any) -> Binding:
    """Give names to communicators, for `axis_name` of PyTorch, NumPy and CuPy layers.

    The names hold from this call on, in the whole process; used as a context manager, until its
    end. In JAX they are not needed: `jax.shard_map` and its like bind names themselves.

    Parameters
    ----------
    mesh : torch.distributed.DeviceMesh, optional
        Binds every named dimension of the mesh.
    **names
        For each name a `torch.distributed.ProcessGroup`, a `DeviceMesh` of one dimension, an
        `mpi4py.MPI.Intracomm`, a `cupy.cuda.nccl.NcclCommunicator` or what
        `cupyx.distributed.init_process_group` returns.

    Returns
    -------
    Binding
        A context manager; its `unbind()` takes the names back as well.

    Raises
    ------
    groupnorm.errors.ArgumentTypeError, groupnorm.errors.ArgumentValueError
        If nothing is named, a mesh has no names, or a name is given no communicator.

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import GroupNorm, bind_axis
    >>> layer = GroupNorm(4, num_groups=2, axis_name="rows")
    >>> layer(np.ones((3, 4), np.float32))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    groupnorm.errors.AxisNameError: axis_name='rows' is not bound (bound names: none): ...

    With mpi4py, under ``mpiexec -n 4``:

    >>> from mpi4py import MPI  # doctest: +SKIP
    >>> with bind_axis(rows=MPI.COMM_WORLD):  # doctest: +SKIP
    ...     y = layer(np.ones((3, 4), np.float32))
    """
    if mesh is not None:
        dimensions = getattr(mesh, "mesh_dim_names", None)
        if not dimensions:
            raise ArgumentTypeError(
                f"mesh={mesh!r} is no DeviceMesh with named dimensions: what is bound without a "
                "keyword must bring names. Pass mesh_dim_names to init_device_mesh, or bind it "
                "under a name, as in bind_axis(rows=...)."
            )
        names = {name: mesh[name] for name in dimensions} | names
    if not names:
        raise ArgumentValueError(
            "bind_axis() is given no name: give at least one, as in bind_axis(rows=group)."
        )
    for name, communicator in names.items():
        # Whose it is will be known when an array comes. (PyTorch's word for the group of others is
        # an int, so that may be one.)
        if communicator is None or isinstance(communicator, str):
            raise ArgumentTypeError(
                f"{name}={communicator!r} is no communicator: bind a torch.distributed "
                "ProcessGroup (which there is after init_process_group) or DeviceMesh of one "
                "dimension, an mpi4py communicator or one of NCCL. JAX binds its axes itself."
            )
    return Binding(names)


def bound(axis_name: Any) -> list[Any]:
    """Return what a name, or several, stand for; what is no name stands for itself.

    Raises
    ------
    AxisNameError
        If a name is not bound.
    """
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    if not names:
        raise AxisNameError(
            f"axis_name={axis_name!r} names no axis: give at least one name, or leave axis_name "
            "out."
        )
    return [_bound_to(name) for name in names]


def _bound_to(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    if name not in _bound:
        known = ", ".join(map(repr, _bound)) or "none"
        raise AxisNameError(
            f"axis_name={name!r} is not bound (bound names: {known}): statistics of this "
            "array alone would be wrong. Bind it to a communicator first, as in "
            f"groupnorm.bind_axis({name}=group), or leave axis_name out."
        )
    return _bound[name][-1][1]
