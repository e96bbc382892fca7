"""The rows of the libraries: how each places arrays, compiles and differentiates."""

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np

from groupnorm.dtypes import small_float
from groupnorm.errors import ArgumentValueError
from groupnorm.testing.row import Row

__all__ = ["LIBRARY_ROWS"]

Array = Any

WITH_HALVES = Row.dtypes | {"float16", "bfloat16"}
WIDE = frozenset({"float64", "complex128", "int64", "uint64"})

_NO_AUTODIFF = "{} has no automatic differentiation: give check() a vjp="


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
    dtypes = WITH_HALVES

    def asarray(self, a: "np.ndarray[Any, Any]") -> Array:
        """Copy an array with its layout in memory; what is read-only stays so."""
        made = _in_same_layout(a)
        made.flags.writeable = self.tag != "readonly" and a.flags.writeable
        return made

    def is_array(self, y: object) -> bool:
        return isinstance(y, np.ndarray | np.generic)  # which reductions return


class _JaxRow(Row):
    cannot = MappingProxyType({})
    dtypes = WITH_HALVES

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
    dtypes = WITH_HALVES

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
    dtypes = WITH_HALVES
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

    @property
    def dtypes(self) -> frozenset[str]:  # type: ignore[override]
        """MLX has float64 on CPUs only."""
        wide = {"complex128", *({"float64"} if self.on_gpu() else ())}
        return WITH_HALVES - wide

    def on_gpu(self) -> bool:
        return bool(self.module.default_device().type != self.module.cpu)

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
        made = self.module.array(a, dtype=self.module.float64 if a.dtype == np.float64 else None)
        if np.array(made).dtype != a.dtype:
            raise ArgumentValueError(f"MLX has no {a.dtype}: convert the array first.")
        return made

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


#: The class of each row.
LIBRARY_ROWS: dict[str, type[Row]] = {
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
}
