"""Names for communicators, for libraries that do not name them themselves.

JAX names its mapped axes. For torch.distributed, MPI and NCCL a layer may hold the name of a
communicator instead of the communicator itself: then it can be copied, pickled and converted to
another backend, and the same code runs on every engine.
"""

import atexit
from typing import Any

from groupnorm.errors import ArgumentTypeError, ArgumentValueError, AxisNameError

__all__ = ["Binding", "bind_axis", "bound"]

# For each name the bindings and their communicators, the latest last. Global to the process, not
# per thread or context: autograd runs in separate threads.
_bound: "dict[str, list[tuple[Binding, Any]]]" = {}
# A process group that is released later, with the modules, aborts the process (torch 2.13, gloo).
atexit.register(_bound.clear)


class Binding:
    """The names bound by one call of `bind_axis`; a context manager that unbinds them on exit."""

    def __init__(self, names: dict[str, Any]) -> None:
        for name, communicator in names.items():
            _bound.setdefault(name, []).append((self, communicator))

    def unbind(self) -> None:
        """Unbind the names: each is bound as before again, or not at all."""
        for name, entries in list(_bound.items()):
            entries[:] = [entry for entry in entries if entry[0] is not self]
            if not entries:
                del _bound[name]

    def __enter__(self) -> "Binding":
        return self

    def __exit__(self, *exception: object) -> None:
        self.unbind()


def bind_axis(mesh: Any = None, /, **names: Any) -> Binding:
    """Bind names to communicators, for `axis_name` of PyTorch, NumPy and CuPy layers.

    The names are bound from this call on, in the whole process; as a context manager, until its
    exit. JAX does not need them: `jax.shard_map` and similar functions bind names themselves.

    Parameters
    ----------
    mesh : torch.distributed.DeviceMesh, optional
        Binds every named dimension of the mesh.
    **names
        For each name a `torch.distributed.ProcessGroup`, a one-dimensional `DeviceMesh`, an
        `mpi4py.MPI.Intracomm`, a `cupy.cuda.nccl.NcclCommunicator` or the result of
        `cupyx.distributed.init_process_group`.

    Returns
    -------
    Binding
        A context manager; its method `unbind()` has the same effect as leaving it.

    Raises
    ------
    groupnorm.errors.ArgumentTypeError, groupnorm.errors.ArgumentValueError
        If there is no name, a mesh has no names, or a value is a string or None. Other objects that
        are no communicators raise in the call, where their library is known.

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
                f"mesh={mesh!r} is not a DeviceMesh with named dimensions: without a keyword, "
                "bind_axis needs the names of the mesh. Pass mesh_dim_names to init_device_mesh, "
                "or bind it under a name, as in bind_axis(rows=...)."
            )
        names = {name: mesh[name] for name in dimensions} | names
    if not names:
        raise ArgumentValueError(
            "bind_axis() received no name: give at least one, as in bind_axis(rows=group)."
        )
    for name, communicator in names.items():
        # Which library it belongs to is checked in the call, by the array's adapter. (PyTorch's
        # placeholder for a group of other ranks is an int, so an int may be valid.)
        if communicator is None or isinstance(communicator, str):
            raise ArgumentTypeError(
                f"{name}={communicator!r} is not a communicator: bind a torch.distributed "
                "ProcessGroup (available after init_process_group) or one-dimensional DeviceMesh, "
                "an mpi4py communicator or an NCCL communicator. JAX binds its axes itself."
            )
    return Binding(names)


def bound(axis_name: Any) -> list[Any]:
    """Return the communicators of one or several names; other objects are returned as they are.

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
