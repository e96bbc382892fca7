"""The rows the suite runs on: every array library, in each way it can be used.

A row's value is ``"<library>[:<tag>]"``, so ``pytest -k torch:compile`` selects it. Libraries are
imported when a row is first used, so that ``--backends numpy`` needs only NumPy.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import importlib.util
import math
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from groupnorm import group_norm, group_norm_vjp

# The accuracy contract for float32: |error| <= 5e-6 * max(1, |reference|). Never loosen it.
CONTRACT = 5e-6
# The same number of roundings in float64.
CONTRACT_64 = CONTRACT * np.finfo(np.float64).eps / np.finfo(np.float32).eps
# Gradients, relative to the largest: at offset 0 and at offset 1e3.
GRADIENT = 2e-6
GRADIENT_FAR = 1e-4

WIDE = {"float64", "complex128", "int64", "uint64"}
COMMON = (
    "float32 float64 complex64 complex128 bool uint8 uint16 uint32 uint64 int8 int16 int32 int64"
)


class Backend(enum.Enum):
    """One row."""

    NUMPY = "numpy"
    NUMPY_READONLY = "numpy:readonly"
    JAX = "jax"
    JAX_JIT = "jax:jit"
    JAX_GPU = "jax:gpu"
    TORCH = "torch"
    TORCH_COMPILE = "torch:compile"
    TORCH_GPU = "torch:gpu"
    STRICT = "array_api_strict"
    STRICT_DEVICE = "array_api_strict:device1"
    DASK = "dask"
    CUPY = "cupy"
    TOY = "toy"  # a backend that is not part of the package: tests/toy_backend.py

    def __str__(self) -> str:
        return self.value

    @property
    def library(self) -> str:
        return self.value.partition(":")[0]

    @property
    def tag(self) -> str:
        return self.value.partition(":")[2]

    @property
    def needs_gpu(self) -> bool:
        return self.tag == "gpu" or self is Backend.CUPY

    @property
    def compiled(self) -> bool:
        return self in (Backend.JAX_JIT, Backend.TORCH_COMPILE)

    @property
    def differentiable(self) -> bool:
        """Whether the library itself can differentiate `group_norm`."""
        return self.library in ("jax", "torch")

    @property
    def xp(self) -> Any:
        """The array API namespace."""
        if self.library == "dask":
            return importlib.import_module("array_api_compat.dask.array")
        return array_api_compat.array_namespace(self.empty())

    def empty(self) -> Any:
        return self.asarray(np.zeros(0, dtype=np.float32))

    def gpu_present(self) -> bool:
        if importlib.util.find_spec(self.library) is None:
            return False
        if self.library == "torch":
            return importlib.import_module("torch").cuda.is_available()
        if self.library == "jax":
            jax = importlib.import_module("jax")
            with contextlib.suppress(RuntimeError):
                return bool(jax.devices("gpu"))
            return False
        cupy = importlib.import_module("cupy")
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
            return cupy.cuda.runtime.getDeviceCount() > 0
        return False

    @property
    def device(self) -> Any:
        """The device of this row's arrays, as the library represents it."""
        match self.library:
            case "torch":
                return importlib.import_module("torch").device(
                    "cuda:0" if self.tag == "gpu" else "cpu"
                )
            case "jax":
                return importlib.import_module("jax").devices(
                    self.tag if self.tag == "gpu" else "cpu"
                )[0]
            case "array_api_strict":
                strict = importlib.import_module("array_api_strict")
                return strict.Device(self.tag or "CPU_DEVICE")
            case "cupy":
                return importlib.import_module("cupy").cuda.Device(0)
        return "cpu"

    @property
    def dtypes(self) -> set[str]:
        """The dtypes the library supports."""
        names = set(COMMON.split())
        if self.library in ("numpy", "jax", "torch", "cupy"):
            names |= {"float16", "bfloat16"}
        elif self.library == "dask":
            names |= {"float16"}
        return names

    def dtype(self, name: str) -> Any:
        """Return the library's own dtype object."""
        if self.library in ("torch", "array_api_strict"):
            return getattr(importlib.import_module(self.library), name)
        if self.library == "jax":
            return np.dtype(importlib.import_module("jax.numpy").dtype(name))
        return host_dtype(name)

    @property
    def default_float(self) -> str:
        return "float32" if self.library in ("jax", "torch") else "float64"

    def precision(self, *dtypes: str | None):
        """Return a context in which the library keeps these dtypes, which JAX otherwise narrows."""
        if self.library == "jax" and WIDE & set(dtypes):
            return importlib.import_module("jax").enable_x64(True)
        return contextlib.nullcontext()

    def asarray(self, a: np.ndarray) -> Any:
        """Copy a NumPy array to this row's library and device, keeping the dtype and every bit."""
        a = np.array(a, order="C")
        match self.library:
            case "numpy":
                a.flags.writeable = self.tag != "readonly"
                return a
            case "torch":
                torch = importlib.import_module("torch")
                if a.dtype.name == "bfloat16":
                    return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16).to(self.device)
                return torch.from_numpy(a).to(self.device)
            case "jax":
                out = importlib.import_module("jax").device_put(a, self.device)
                assert out.dtype == a.dtype, f"{a.dtype} needs backend.precision({a.dtype.name!r})"
                return out
            case "array_api_strict":
                return importlib.import_module("array_api_strict").asarray(a, device=self.device)
            case "toy":
                return a.view(importlib.import_module("tests.toy_backend").ToyArray)
            case "dask":
                chunks = tuple(max(1, -(-n // 2)) for n in a.shape)
                return importlib.import_module("dask.array").from_array(a, chunks=chunks)
        return importlib.import_module("cupy").asarray(a)

    def to_numpy(self, y: Any) -> np.ndarray:
        """Return a NumPy copy of the same dtype."""
        match self.library:
            case "torch":
                torch = importlib.import_module("torch")
                y = y.detach().cpu().resolve_conj().resolve_neg()
                if y.dtype == torch.bfloat16:
                    return y.contiguous().view(torch.int16).numpy().view(host_dtype("bfloat16"))
                return y.numpy()
            case "dask":
                return y.compute()
            case "cupy":
                return y.get()
            case "array_api_strict":
                return np.array(y.to_device(type(self).STRICT.device))
        return np.asarray(y)

    def transform(self, function):
        """Compile `function` if this row is a compiled one; its arguments must be arrays."""
        if self is Backend.JAX_JIT:
            return importlib.import_module("jax").jit(function)
        if self is Backend.TORCH_COMPILE:
            return importlib.import_module("torch").compile(function, fullgraph=True)
        return function


class Result(NamedTuple):
    """The result of one call: the array, and its values on the host."""

    given: Any
    array: Any
    values: np.ndarray


class Differentiated(NamedTuple):
    """Output and gradients on the host; their library, dtype, device and shape were checked."""

    y: np.ndarray
    x: np.ndarray
    scale: np.ndarray | None
    bias: np.ndarray | None


def host_dtype(name: str) -> np.dtype:
    """Return NumPy's dtype of this name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    return np.dtype(name)


def dtype_name(dtype: Any) -> str:
    """Return the plain name of any library's dtype."""
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]


def place(backend: Backend, a: Any) -> Any:
    """Convert NumPy arrays to the row's library; return None, lists and other arrays unchanged."""
    return backend.asarray(a) if isinstance(a, np.ndarray) else a


def call_with_arrays(backend: Backend, function, **arguments):
    """Call function(**arguments) through the row's compiler; only arrays are traced."""
    arrays = {k: place(backend, v) for k, v in arguments.items()}
    static = {
        k: v for k, v in arrays.items() if v is None or isinstance(v, (list, bool, int, float))
    }
    traced = {k: v for k, v in arrays.items() if k not in static}
    names = tuple(traced)

    def positional(*values):
        return function(**static, **dict(zip(names, values, strict=True)))

    return backend.transform(positional)(*traced.values()), arrays


def run(backend: Backend, x, scale=None, bias=None, *, mask=None, **keywords) -> Result:
    """Call `group_norm` on this row with arguments given as NumPy arrays."""
    y, arrays = call_with_arrays(
        backend,
        functools.partial(group_norm, **keywords),
        x=x,
        scale=scale,
        bias=bias,
        mask=mask,
    )
    return Result(arrays["x"], y, backend.to_numpy(y))


def check_array(backend: Backend, y: Any, *, shape, dtype: str) -> None:
    """Assert library, dtype, device and shape, which come before any value."""
    assert isinstance(y, type(backend.empty())), f"{type(y)} is not an array of {backend.library}"
    assert dtype_name(y.dtype) == dtype
    assert array_api_compat.device(y) == array_api_compat.device(backend.empty())
    assert tuple(y.shape) == tuple(shape)


def assert_close(actual: np.ndarray, reference: np.ndarray, *, tolerance: float) -> None:
    """Assert |error| <= tolerance * max(1, |reference|), and NaN exactly where the reference is."""
    actual = np.asarray(actual)
    wide = actual.astype(np.complex128 if np.iscomplexobj(actual) else np.float64)
    assert wide.shape == reference.shape
    np.testing.assert_array_equal(np.isnan(wide), np.isnan(reference))
    finite = ~np.isnan(reference)
    error = np.abs(wide - reference)[finite] / np.maximum(1, np.abs(reference))[finite]
    assert error.max(initial=0) <= tolerance, f"worst {error.max():.3g}, allowed {tolerance:.3g}"


def assert_result(
    backend: Backend, result: Result, reference, *, dtype="float32", tolerance=CONTRACT
) -> None:
    """Assert that a call returned an array like its input, with the reference's values."""
    check_array(backend, result.array, shape=result.given.shape, dtype=dtype)
    assert_close(result.values, reference, tolerance=tolerance)


def assert_gradient(actual, reference, *, rtol: float, at_least: float = 0.0) -> None:
    """Assert the error relative to the largest gradient (or to `at_least`, if all terms cancel)."""
    if reference is None:
        assert actual is None
        return
    assert actual.shape == reference.shape
    assert np.isfinite(np.abs(actual)).all()
    if not reference.size:
        return
    wide = actual.astype(reference.dtype)
    largest = max(np.abs(reference).max(), at_least, math.ulp(0))
    error = np.abs(wide - reference).max() / largest
    assert error <= rtol, f"relative error {error:.3g}, allowed {rtol:.3g}"


def assert_gradients(got: Differentiated, want, *, rtol: float, at_least: float = 0.0) -> None:
    """Assert all three gradients; `at_least` applies to the input's."""
    assert_gradient(got.x, want.x, rtol=rtol, at_least=at_least)
    assert_gradient(got.scale, want.scale, rtol=rtol)
    assert_gradient(got.bias, want.bias, rtol=rtol)


def differentiate(
    backend: Backend, x, dy, scale=None, bias=None, *, how="vjp", mask=None, **keywords
) -> Differentiated:
    """Return the output and gradients.

    how="vjp" uses `group_norm_vjp`, how="autodiff" the library's automatic differentiation.
    """
    method = {"vjp": _by_vjp, "jax": _by_jax, "torch": _by_torch}[
        how if how == "vjp" else backend.library
    ]
    outer = backend
    if method is _by_torch and backend is Backend.TORCH_COMPILE:
        # The forward pass is compiled; autograd runs outside of it, as in a training loop.
        outer, method = Backend.TORCH, functools.partial(_by_torch, compiled=True)
    out, arrays = call_with_arrays(
        outer,
        functools.partial(method, keywords=keywords),
        x=x,
        dy=dy,
        scale=scale,
        bias=bias,
        mask=mask,
    )
    checked = []
    like = (arrays["dy"], arrays["x"], arrays["scale"], arrays["bias"])
    for got, given in zip(out, like, strict=True):
        if given is None:
            assert got is None
            checked.append(None)
            continue
        check_array(backend, got, shape=given.shape, dtype=dtype_name(given.dtype))
        checked.append(backend.to_numpy(got))
    return Differentiated(*checked)


def _by_vjp(x, dy, scale, bias, mask, keywords):
    y, pullback = group_norm_vjp(x, scale, bias, mask=mask, **keywords)
    grads = pullback(dy)
    return y, grads.x, grads.scale, grads.bias


def _by_jax(x, dy, scale, bias, mask, keywords):
    jax = importlib.import_module("jax")

    def forward(x, scale, bias):
        return group_norm(x, scale, bias, mask=mask, **keywords)

    y, pullback = jax.vjp(forward, x, scale, bias)
    # JAX's complex cotangents are the conjugates of torch's, whose convention the library follows.
    grads = pullback(dy.conj())
    return y, *(None if g is None else g.conj() for g in grads)


def _by_torch(x, dy, scale, bias, mask, keywords, compiled=False):
    torch = importlib.import_module("torch")
    forward = torch.compile(group_norm, fullgraph=True) if compiled else group_norm
    leaves = [a if a is None else a.detach().requires_grad_() for a in (x, scale, bias)]
    y = forward(*leaves, mask=mask, **keywords)
    wanted = [a for a in leaves if a is not None]
    grads = iter(torch.autograd.grad(y, wanted, dy))
    return y.detach(), *(None if a is None else next(grads) for a in leaves)
