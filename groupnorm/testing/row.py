"""What a row of a consistency test can do, whatever its library."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

__all__ = ["Row"]

Array = Any

REAL = ("float32", "float64")
COMPLEX = ("complex64", "complex128")
INTEGERS = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")


class Row:
    """One way of running functions of arrays: a library, and how it is used.

    A subclass for another library overrides `asarray`, `to_numpy` and what else differs, and is
    added by `register_row`. One that overrides `vjp` also sets `cannot` to ``{}``.

    Parameters
    ----------
    name : str
        ``"library"`` or ``"library:tag"``, where the library is what is imported.
    """

    #: What a row of this kind cannot do, and why; the only name is "autodiff".
    cannot: Mapping[str, str] = MappingProxyType(
        {"autodiff": "the row has no vjp(): give check() a vjp="}
    )
    #: The names of the dtypes that it has.
    dtypes: frozenset[str] = frozenset((*REAL, *COMPLEX, *INTEGERS))
    #: Whether it can be used on machines with a GPU only.
    needs_gpu = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.library, _, self.tag = name.partition(":")

    def __repr__(self) -> str:
        return f"<row {self.name}>"

    def __str__(self) -> str:
        return self.name

    @property
    def module(self) -> Any:
        """The library, which is imported now."""
        return importlib.import_module(self.library)

    @property
    def xp(self) -> Any:
        """The array API namespace of the library."""
        from array_api_compat import array_namespace

        return array_namespace(self.empty())

    def empty(self) -> Array:
        """Return an array of this row without elements."""
        return self.asarray(np.zeros(0, np.float32))

    @property
    def why_absent(self) -> str | None:
        """Why the row cannot be used on this machine; None if it can."""
        if importlib.util.find_spec(self.library) is None:
            return f"{self.library} is not installed"
        if self.needs_gpu and not (_gpu_driver_present() and self.has_gpu()):
            return f"{self.library} finds no GPU"
        return None

    def has_gpu(self) -> bool:
        """Whether the library can use a GPU; asked only if `needs_gpu` and if a driver is there."""
        return False

    def asarray(self, a: "np.ndarray[Any, Any]") -> Array:
        """Copy a NumPy array to the library and device of this row, with its dtype and bits."""
        raise NotImplementedError(f"{type(self).__name__} does not override asarray()")

    def to_numpy(self, y: Array) -> "np.ndarray[Any, Any]":
        """Copy an array to NumPy, with its dtype and bits."""
        return np.asarray(y)

    def is_array(self, y: object) -> bool:
        """Whether an object is an array of this library."""
        return isinstance(y, type(self.empty()))

    def device_of(self, y: Array) -> Any:
        """Return the device of an array, to be compared with that of another."""
        from array_api_compat import device

        return device(y)

    def precision(self, *dtypes: str | None) -> AbstractContextManager[Any]:
        """Return a context in which the library keeps arrays of these dtypes as they are."""
        return nullcontext()

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as this row runs it; its arguments are arrays."""
        return function

    def vjp(
        self,
        function: Callable[..., Sequence[Array]],
        arrays: Sequence[Array],
        wanted: Sequence[int],
        cotangents: Sequence[Array],
    ) -> tuple[list[Array], list[Array]]:
        """Return the results, and the gradients for the wanted arrays, by the library's autodiff.

        Parameters
        ----------
        function : callable
            Takes all arrays, and returns a list of arrays.
        arrays : sequence of array
        wanted : sequence of int
            The positions of those to differentiate with respect to.
        cotangents : sequence of array
            One for each result.
        """
        raise NotImplementedError(self.cannot["autodiff"])


def _gpu_driver_present() -> bool:
    """Whether there can be a GPU's driver, asked first: libraries take seconds to import."""
    devices = ("nvidia*", "nvhost*", "dxg", "kfd")  # of CUDA, of CUDA in WSL, of ROCm
    return sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in devices)
