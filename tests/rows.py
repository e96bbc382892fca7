"""The rows the suite runs on, those of `groupnorm.testing`, and how they call `group_norm`.

Libraries are imported when a row is first used, so that ``--backends numpy`` needs only NumPy.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from groupnorm import group_norm, group_norm_vjp
from groupnorm.testing.assertions import assert_accurate
from groupnorm.testing.compare import dtype_name, worst
from groupnorm.testing.registry import Row, known_rows

# The accuracy contract for float32: |error| <= 5e-6 * max(1, |reference|). Never loosen it.
CONTRACT = 5e-6
# The same number of roundings in float64.
CONTRACT_64 = CONTRACT * np.finfo(np.float64).eps / np.finfo(np.float32).eps
# Gradients, relative to the largest: at offset 0 and at offset 1e3.
GRADIENT = 2e-6
GRADIENT_FAR = 1e-4


class ToyRow(Row):
    """The backend that is not part of the package: tests/toy_backend.py."""

    cannot = MappingProxyType({"autodiff": "the toy has no automatic differentiation"})
    why_absent = None

    def asarray(self, a: np.ndarray) -> Any:
        return np.array(a, order="C").view(importlib.import_module("tests.toy_backend").ToyArray)


TOY = ToyRow("toy")
ROWS = {**known_rows(), "toy": TOY}


def default_float(row: Row) -> str:
    """Return the name of the library's default dtype."""
    return "float32" if row.library in ("jax", "torch", "mlx") else "float64"


def compiles(row: Row) -> bool:
    """Whether the row compiles what it runs."""
    return row.tag in ("jit", "compile")


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


def place(row: Row, a: Any) -> Any:
    """Convert NumPy arrays to the row's library; return None, lists and other arrays unchanged."""
    return row.asarray(a) if isinstance(a, np.ndarray) else a


def call_with_arrays(row: Row, function, **arguments):
    """Call function(**arguments) through the row's compiler; only arrays are traced."""
    arrays = {k: place(row, v) for k, v in arguments.items()}
    static = {
        k: v for k, v in arrays.items() if v is None or isinstance(v, (list, bool, int, float))
    }
    traced = {k: v for k, v in arrays.items() if k not in static}
    names = tuple(traced)

    def positional(*values):
        return function(**static, **dict(zip(names, values, strict=True)))

    return row.compiled(positional)(*traced.values()), arrays


def run(row: Row, x, scale=None, bias=None, *, mask=None, **keywords) -> Result:
    """Call `group_norm` on this row with arguments given as NumPy arrays."""
    y, arrays = call_with_arrays(
        row,
        functools.partial(group_norm, **keywords),
        x=x,
        scale=scale,
        bias=bias,
        mask=mask,
    )
    return Result(arrays["x"], y, row.to_numpy(y))


def check_array(row: Row, y: Any, *, shape, dtype: str) -> None:
    """Assert library, dtype, device and shape, which come before any value."""
    like = row.empty()
    assert isinstance(y, type(like)), f"{type(y)} is not an array of {row.library}"
    assert dtype_name(y) == dtype
    assert row.device_of(y) == row.device_of(like)
    assert tuple(y.shape) == tuple(shape)


def assert_close(actual: np.ndarray, reference: np.ndarray, *, tolerance: float) -> None:
    """Assert |error| <= tolerance * max(1, |reference|), and NaN exactly where the reference is."""
    assert_accurate(np.asarray(actual), reference, bound=tolerance, units="mixed")


def assert_result(
    row: Row, result: Result, reference, *, dtype="float32", tolerance=CONTRACT
) -> None:
    """Assert that a call returned an array like its input, with the reference's values."""
    check_array(row, result.array, shape=result.given.shape, dtype=dtype)
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
    largest = max(np.abs(reference).max(), at_least, math.ulp(0))
    error = worst(actual, reference, "relative", largest).error
    assert error <= rtol, f"relative error {error:.3g}, allowed {rtol:.3g}"


def assert_gradients(got: Differentiated, want, *, rtol: float, at_least: float = 0.0) -> None:
    """Assert all three gradients; `at_least` applies to the input's."""
    assert_gradient(got.x, want.x, rtol=rtol, at_least=at_least)
    assert_gradient(got.scale, want.scale, rtol=rtol)
    assert_gradient(got.bias, want.bias, rtol=rtol)


def differentiate(
    row: Row, x, dy, scale=None, bias=None, *, how="vjp", mask=None, **keywords
) -> Differentiated:
    """Return the output and gradients.

    how="vjp" uses `group_norm_vjp`, how="autodiff" the library's automatic differentiation.
    """
    method = _by_vjp if how == "vjp" else _by_autodiff
    out, given = method(row, x, dy, scale, bias, mask, keywords)
    checked = []
    like = (given["dy"], given["x"], given["scale"], given["bias"])
    for got, array in zip(out, like, strict=True):
        if array is None:
            assert got is None
            checked.append(None)
            continue
        check_array(row, got, shape=array.shape, dtype=dtype_name(array))
        checked.append(row.to_numpy(got))
    return Differentiated(*checked)


def _by_vjp(row, x, dy, scale, bias, mask, keywords):
    def function(x, dy, scale, bias, mask):
        y, pullback = group_norm_vjp(x, scale, bias, mask=mask, **keywords)
        return y, *pullback(dy)

    return call_with_arrays(row, function, x=x, dy=dy, scale=scale, bias=bias, mask=mask)


def _by_autodiff(row, x, dy, scale, bias, mask, keywords):
    arguments = {"x": x, "scale": scale, "bias": bias, "mask": mask}
    given = {name: place(row, a) for name, a in arguments.items()}
    present = [name for name in given if isinstance(arguments[name], np.ndarray)]
    wanted = [i for i, name in enumerate(present) if name != "mask"]

    cotangent = place(row, dy)
    others = {name: a for name, a in given.items() if name not in present}

    def forward(*arrays):
        return [group_norm(**others, **dict(zip(present, arrays, strict=True)), **keywords)]

    [y], found = row.vjp(forward, [given[name] for name in present], wanted, [cotangent])
    gradients = dict(zip([present[i] for i in wanted], found, strict=True))
    return (y, *(gradients.get(name) for name in ("x", "scale", "bias"))), given | {"dy": cotangent}
