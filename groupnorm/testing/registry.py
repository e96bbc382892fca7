"""Rows of a consistency test: every array library, in each way that it can be used.

A row's name is ``"library"`` or ``"library:tag"``, such as ``torch`` and ``torch:compile``. A
library is imported when a row of it is used; or when its GPUs are looked for, where a driver is.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from groupnorm.dtypes import small_float
from groupnorm.errors import ArgumentTypeError, ArgumentValueError

__all__ = [
    "Row",
    "known_rows",
    "names_of",
    "register_row",
    "row_names",
    "row_of",
    "rows",
    "rows_of",
]

Array = Any

REAL = ("float32", "float64")
COMPLEX = ("complex64", "complex128")
INTEGERS = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
WIDE = frozenset({"float64", "complex128", "int64", "uint64"})

_NO_AUTODIFF = "{} has no automatic differentiation: give check() a vjp="


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
        raise NotImplementedError

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


def _of_wanted(
    function: Callable[..., Sequence[Array]], arrays: Sequence[Array], wanted: Sequence[int]
) -> tuple[Callable[..., list[Array]], list[Array]]:
    """Return the function of the wanted arrays alone, and these arrays."""

    def of_wanted(*chosen: Array) -> list[Array]:
        merged = list(arrays)
        for i, a in zip(wanted, chosen, strict=True):
            merged[i] = a
        return list(function(*merged))

    return of_wanted, [arrays[i] for i in wanted]


def _contiguous(a: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Copy an array into memory as every library takes it."""
    return np.array(a, a.dtype.newbyteorder("="), order="C")


def _in_same_layout(a: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Copy an array with its strides, alignment and byte order."""
    a = np.asarray(a)
    reach = [stride * (n - 1) for stride, n in zip(a.strides, a.shape, strict=True)]
    first = -sum(min(0, r) for r in reach)
    size = first + sum(max(0, r) for r in reach) + a.itemsize
    if a.size == 0 or size > 64 * a.nbytes:  # a few elements here and there of a large array
        return a.copy(order="K")
    shift = a.ctypes.data % a.dtype.alignment
    memory = np.zeros(size + 2 * a.dtype.alignment, np.uint8)
    shift = (shift - first - memory.ctypes.data) % a.dtype.alignment
    made = np.ndarray(a.shape, a.dtype, memory.data, first + shift, a.strides)
    made[...] = a
    return made


class _NumpyRow(Row):
    cannot = MappingProxyType({"autodiff": _NO_AUTODIFF.format("NumPy")})
    dtypes = Row.dtypes | {"float16", "bfloat16"}

    def asarray(self, a: "np.ndarray[Any, Any]") -> Array:
        """Copy an array with its layout in memory; what is read-only stays so."""
        made = _in_same_layout(a)
        made.flags.writeable = self.tag != "readonly" and a.flags.writeable
        return made

    def is_array(self, y: object) -> bool:
        return isinstance(y, np.ndarray | np.generic)  # which reductions return


class _JaxRow(Row):
    cannot = MappingProxyType({})
    dtypes = Row.dtypes | {"float16", "bfloat16"}

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.needs_gpu = self.tag == "gpu"

    def has_gpu(self) -> bool:
        try:
            return bool(self.module.devices("gpu"))
        except RuntimeError:  # there is no such platform
            return False

    def asarray(self, a: "np.ndarray[Any, Any]") -> Array:
        device = self.module.devices(self.tag if self.needs_gpu else "cpu")[0]
        # JAX may share the memory of the host.
        a = _contiguous(a)
        made = self.module.device_put(a, device)
        if made.dtype != a.dtype:
            raise ArgumentValueError(
                f"an array of {a.dtype} would become one of {made.dtype}: enter "
                f"row.precision({a.dtype.name!r}) first."
            )
        return made

    def is_array(self, y: object) -> bool:
        return isinstance(y, self.module.Array)

    def precision(self, *dtypes: str | None) -> AbstractContextManager[Any]:
        if WIDE.isdisjoint(dtypes):
            return nullcontext()
        context: AbstractContextManager[Any] = self.module.enable_x64(True)
        return context

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.tag != "jit":
            return function
        made: Callable[..., Any] = self.module.jit(function)
        return made

    def vjp(
        self,
        function: Callable[..., Sequence[Array]],
        arrays: Sequence[Array],
        wanted: Sequence[int],
        cotangents: Sequence[Array],
    ) -> tuple[list[Array], list[Array]]:
        def pulled_back(arrays: Sequence[Array], cotangents: Sequence[Array]) -> Any:
            of_wanted, chosen = _of_wanted(function, arrays, wanted)
            results, pullback = self.module.vjp(of_wanted, *chosen)
            # JAX's complex cotangents are the conjugates of those of other libraries.
            found = pullback([_conjugate(c) for c in cotangents])
            return results, [_conjugate(g) for g in found]

        results, found = self.compiled(pulled_back)(list(arrays), list(cotangents))
        return results, found


def _conjugate(a: Array) -> Array:
    return a.conj() if a.dtype.kind == "c" else a


class _TorchRow(Row):
    cannot = MappingProxyType({})
    dtypes = Row.dtypes | {"float16", "bfloat16"}

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.needs_gpu = self.tag == "cuda"

    def has_gpu(self) -> bool:
        return bool(self.module.cuda.is_available())

    def asarray(self, a: "np.ndarray[Any, Any]") -> Array:
        """Copy an array, with its strides where PyTorch can have them."""
        device = "cuda:0" if self.needs_gpu else "cpu"
        kept = a.flags.aligned and a.dtype.isnative and all(s >= 0 for s in a.strides)
        kept = kept and all(s % a.itemsize == 0 for s in a.strides)
        a = _in_same_layout(a) if kept else _contiguous(a)
        if a.dtype.name == "bfloat16":
            bits = self.module.from_numpy(a.view(np.int16))
            return bits.view(self.module.bfloat16).to(device)
        return self.module.from_numpy(a).to(device)

    def to_numpy(self, y: Array) -> "np.ndarray[Any, Any]":
        y = y.detach().cpu().resolve_conj().resolve_neg()
        if y.dtype == self.module.bfloat16:
            return np.array(y.contiguous().view(self.module.int16).numpy()).view(
                small_float("bfloat16")
            )
        return np.array(y.numpy())

    def is_array(self, y: object) -> bool:
        return isinstance(y, self.module.Tensor)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.tag != "compile":
            return function
        self.module.compiler.reset()  # recompilations are counted for each function
        made: Callable[..., Any] = self.module.compile(function, fullgraph=True)

        def call(*arrays: Array) -> Any:
            with warnings.catch_warnings():
                # array_api_compat caches the namespace of each type, which is harmless.
                warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cac")
                warnings.filterwarnings("ignore", "Torchinductor does not support code generat")
                try:
                    return made(*arrays)
                except RuntimeError as error:
                    # Dynamo goes through sys.modules, for array_api_compat, while it imports
                    # modules of its own for the first time.
                    if "dictionary changed size" not in str(error):
                        raise
                    self.module.compiler.reset()
                    return made(*arrays)

        return call

    def vjp(
        self,
        function: Callable[..., Sequence[Array]],
        arrays: Sequence[Array],
        wanted: Sequence[int],
        cotangents: Sequence[Array],
    ) -> tuple[list[Array], list[Array]]:
        with self.module.inference_mode(False), self.module.enable_grad():
            leaves = [
                (a.clone() if a.is_inference() else a.detach()).requires_grad_(i in wanted)
                for i, a in enumerate(arrays)
            ]
            cotangents = [c.clone() if c.is_inference() else c for c in cotangents]
            chosen = [leaves[i] for i in wanted]
            # The forward pass is compiled, and differentiated as in a training loop.
            results = self.compiled(function)(*leaves)
        recorded = [(y, c) for y, c in zip(results, cotangents, strict=True) if y.requires_grad]
        found: Sequence[Array | None] = [None] * len(chosen)
        if recorded:
            ys, cs = zip(*recorded, strict=True)
            found = self.module.autograd.grad(ys, chosen, cs, allow_unused=True)
        return [y.detach() for y in results], [
            self.module.zeros_like(a) if g is None else g
            for a, g in zip(chosen, found, strict=True)
        ]


class _CupyRow(Row):
    cannot = MappingProxyType({"autodiff": _NO_AUTODIFF.format("CuPy")})
    dtypes = Row.dtypes | {"float16", "bfloat16"}
    needs_gpu = True

    def has_gpu(self) -> bool:
        try:
            return bool(self.module.cuda.runtime.getDeviceCount() > 0)
        except self.module.cuda.runtime.CUDARuntimeError:
            return False

    def asarray(self, a: "np.ndarray[Any, Any]") -> Array:
        return self.module.asarray(_contiguous(a))

    def to_numpy(self, y: Array) -> "np.ndarray[Any, Any]":
        return np.asarray(y.get())


class _StrictRow(Row):
    """array-api-strict, which has nothing but what the standard says."""

    cannot = MappingProxyType({"autodiff": _NO_AUTODIFF.format("array-api-strict")})

    def asarray(self, a: "np.ndarray[Any, Any]") -> Array:
        device = self.module.Device(self.tag or "CPU_DEVICE")
        return self.module.asarray(_contiguous(a), device=device)

    def to_numpy(self, y: Array) -> "np.ndarray[Any, Any]":
        return np.array(y.to_device(self.module.Device("CPU_DEVICE")))


class _DaskRow(Row):
    """Dask, in chunks of about half of each axis."""

    cannot = MappingProxyType({"autodiff": _NO_AUTODIFF.format("Dask")})
    dtypes = Row.dtypes | {"float16"}

    @property
    def module(self) -> Any:
        return importlib.import_module("dask.array")

    @property
    def xp(self) -> Any:
        return importlib.import_module("array_api_compat.dask.array")

    def asarray(self, a: "np.ndarray[Any, Any]") -> Array:
        chunks = tuple(max(1, -(-n // 2)) for n in a.shape)
        return self.module.from_array(_contiguous(a), chunks=chunks)

    def to_numpy(self, y: Array) -> "np.ndarray[Any, Any]":
        return np.asarray(y.compute())


class _MlxRow(Row):
    """MLX on its default device."""

    cannot = MappingProxyType({})
    dtypes = (Row.dtypes | {"float16", "bfloat16"}) - {"float64", "complex128"}

    @property
    def module(self) -> Any:
        return importlib.import_module("mlx.core")

    @property
    def xp(self) -> Any:
        return self.module

    def asarray(self, a: "np.ndarray[Any, Any]") -> Array:
        a = _contiguous(a)
        if a.dtype.name == "bfloat16":
            return self.module.array(a.view(np.uint16)).view(self.module.bfloat16)
        return self.module.array(a)

    def to_numpy(self, y: Array) -> "np.ndarray[Any, Any]":
        if y.dtype == self.module.bfloat16:
            return np.array(y.view(self.module.uint16)).view(small_float("bfloat16"))
        return np.array(y)

    def device_of(self, y: Array) -> Any:
        return self.module.default_device()  # arrays have none: memory is shared

    def vjp(
        self,
        function: Callable[..., Sequence[Array]],
        arrays: Sequence[Array],
        wanted: Sequence[int],
        cotangents: Sequence[Array],
    ) -> tuple[list[Array], list[Array]]:
        of_wanted, chosen = _of_wanted(function, arrays, wanted)
        results, found = self.module.vjp(of_wanted, chosen, list(cotangents))
        return list(results), list(found)


_rows: dict[str, Row] = {}


def register_row(row: Row) -> None:
    """Add a row, or replace the one of its name.

    Parameters
    ----------
    row : Row
        Its methods `asarray` and `to_numpy` are called for every array; its attribute `cannot` says
        whether it can differentiate.

    Raises
    ------
    ArgumentTypeError
        If it is no row.
    """
    if not isinstance(row, Row):
        raise ArgumentTypeError(
            f"row={row!r} is not a Row: pass an instance of a subclass of testing.Row."
        )
    _rows[row.name] = row


for _name, _kind in {
    "numpy": _NumpyRow,
    "numpy:readonly": _NumpyRow,
    "jax": _JaxRow,
    "jax:jit": _JaxRow,
    "jax:gpu": _JaxRow,
    "torch": _TorchRow,
    "torch:compile": _TorchRow,
    "torch:cuda": _TorchRow,
    "cupy": _CupyRow,
    "array_api_strict": _StrictRow,
    "array_api_strict:device1": _StrictRow,
    "dask": _DaskRow,
    "mlx": _MlxRow,
}.items():
    register_row(_kind(_name))


def known_rows() -> Mapping[str, Row]:
    """Return all rows by their names, usable here or not."""
    return MappingProxyType(_rows)


def row_names() -> tuple[str, ...]:
    """Return the names of all rows, usable here or not.

    Returns
    -------
    tuple of str
    """
    return tuple(_rows)


def rows(names: str | Iterable[str] | None = None) -> list[Row]:
    """Return rows by their names.

    Parameters
    ----------
    names : str or iterable of str, optional
        Names of rows; "torch:*" stands for all rows of a library that can be used here. A string
        may list several, separated by commas. Default is every row that can be used here.

    Returns
    -------
    list of Row
        In the order of `row_names`, each once.

    Raises
    ------
    ArgumentValueError
        If a name is unknown, or if what it names cannot be used here: what was asked for is not
        left out in silence.

    Examples
    --------
    >>> from groupnorm import testing
    >>> [row.name for row in testing.rows("numpy:*")]
    ['numpy', 'numpy:readonly']
    """
    if names is None:
        return [row for row in _rows.values() if row.why_absent is None]
    chosen: set[str] = set()
    for name in _split(names):
        if name in _rows:
            chosen.add(_usable(name))
            continue
        family = [row for row in _rows.values() if f"{row.library}:*" == name]
        if not family:
            raise ArgumentValueError(
                f"rows={name!r} is not known: choose from {', '.join(_rows)}, or 'torch:*' for all "
                "of a library; others are added by register_row()."
            )
        usable = [row.name for row in family if row.why_absent is None]
        chosen.update(usable or [_usable(family[0].name)])
    return [row for row in _rows.values() if row.name in chosen]


def _usable(name: str) -> str:
    why = _rows[name].why_absent
    if why is not None:
        raise ArgumentValueError(f"rows={name!r} cannot be used here: {why}.")
    return name


def names_of(patterns: str | Iterable[str], *, libraries: bool = False) -> set[str]:
    """Return the names of rows, usable here or not, that names and patterns like "torch:*" mean.

    Parameters
    ----------
    patterns : str or iterable of str
        As for `rows`.
    libraries : bool
        Whether the name of a library means all of its rows.

    Raises
    ------
    ArgumentValueError
        If one is unknown.
    """
    found: set[str] = set()
    for pattern in _split(patterns):
        if libraries and any(row.library == pattern for row in _rows.values()):
            pattern = f"{pattern}:*"
        names = {name for name, row in _rows.items() if pattern in (name, f"{row.library}:*")}
        if not names:
            rows(pattern)  # raises
        found |= names
    return found


def _split(names: str | Iterable[str]) -> list[str]:
    """Return names that may be listed in strings, separated by commas."""
    try:
        listed = [names] if isinstance(names, str) else list(names)
        return [name.strip() for part in listed for name in part.split(",")]
    except (AttributeError, TypeError) as error:
        raise ArgumentTypeError(
            f"rows={names!r} are not names of rows: pass strings such as 'numpy,torch:*'."
        ) from error


def rows_of(
    asked: "str | Iterable[str | Row] | None", without: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Row], dict[str, str]]:
    """Return rows, given by name or as they are, and by name why others are left out."""
    if not isinstance(without, Mapping):
        raise ArgumentTypeError(
            f"without={without!r} has no reasons: pass a mapping, such as {{'dask': 'no sorting'}}."
        )
    why_not = {
        name: why for pattern, why in without.items() for name in names_of(pattern, libraries=True)
    }
    found: list[Row] = []
    if asked is None:
        every = [row for name, row in _rows.items() if name not in why_not]
        absent = {row.name: row.why_absent for row in every}
        found = [row for row in every if absent[row.name] is None]
        return found, why_not | {name: why for name, why in absent.items() if why is not None}
    try:
        listed = rows(asked) if isinstance(asked, str) else list(asked)
    except TypeError as error:
        raise ArgumentTypeError(
            f"rows={asked!r} are not rows: pass names, such as 'numpy,torch:*', or rows."
        ) from error
    for one in listed:
        if isinstance(one, Row) and one.why_absent is not None:
            raise ArgumentValueError(f"rows={one.name!r} cannot be used here: {one.why_absent}.")
        found += [r for r in ([one] if isinstance(one, Row) else rows(one)) if r not in found]
    return [row for row in found if row.name not in why_not], why_not


def row_of(array: Any, argument: str = "array") -> Row:
    """Return a row whose library an array is of; only its library is known by that.

    Raises
    ------
    ArgumentTypeError
        If there is none.
    """
    for cls in type(array).__mro__:
        root = cls.__module__.partition(".")[0].replace("jaxlib", "jax")
        for row in _rows.values():
            if row.library == root and row.is_array(array):
                return row
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    raise ArgumentTypeError(f"{argument} is of {kind}, which is no array of a registered row.")
