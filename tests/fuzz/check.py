"""Run a case in its library, and compare it with the reference."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from groupnorm import group_norm, group_norm_vjp
from groupnorm.errors import ArgumentValueError
from groupnorm.testing.registry import Row
from tests.fuzz.arrays import Laid, Values, lay_out, values_of
from tests.fuzz.cases import Case
from tests.fuzz.reference import Expected, Reference, compute, widen
from tests.rows import ROWS, check_array

NAMES = ("y", "dx", "dscale", "dbias")


def check(case: Case) -> None:
    """Raise AssertionError, saying what is wrong, if the library does not compute the case right.

    In this order: library, dtype, device and shape; that inputs are untouched and not shared; that
    a repeated call gives the same bits; values; that the other implementations agree.
    """
    row = ROWS[case.library]
    values = values_of(case)
    with np.errstate(all="ignore"):
        reference = compute(case, values)
    wide = row.precision(case.dtype, case.computed, case.result_dtype, case.mask_dtype)
    with wide, warnings.catch_warnings():
        warnings.simplefilter("error")
        # A result beyond the range of its dtype is infinite, and NumPy says so.
        warnings.filterwarnings("ignore", "overflow encountered in cast")
        if reference.extreme:
            warnings.filterwarnings("ignore", "(overflow|invalid value) encountered")
        _check(case, row, values, reference)


def _check(case: Case, row: Row, values: Values, reference: Reference) -> None:
    dy = np.where(reference.kinks, values.dy.dtype.type(0), values.dy)
    if reference.kinks.any() and case.dy_layout == "broadcast":
        dy = np.zeros_like(dy)
        values = values._replace(dy=dy)
        reference = compute(case, values)
    values = values._replace(dy=dy)

    laid = _arrays(case, row, values)
    before = [_bits(row, a.base) for a in laid if isinstance(a, Laid)]
    arrays = [a.array if isinstance(a, Laid) else a for a in laid]
    call = _caller(case, arrays)
    got = call()
    if got is None:  # the kernels say that they cannot compute this call
        return
    given = (arrays[1], arrays[0], *arrays[2:4])
    dtypes = (case.result_dtype, case.dtype, case.scale, case.bias)
    for name, array, like, dtype in zip(NAMES, got, given, dtypes, strict=True):
        if like is None or (array is None and case.how == "autodiff"):
            assert array is None, f"{name} without a parameter"
            continue
        try:
            check_array(row, array, shape=like.shape, dtype=dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        if isinstance(array, np.ndarray) and array.size:
            shared = [n for n, a in zip(("x", "dy", "scale", "bias"), arrays, strict=False)
                      if isinstance(a, np.ndarray) and np.may_share_memory(a, array)]  # fmt: skip
            assert not shared, f"{name} shares memory with {shared}"
    after = [_bits(row, a.base) for a in laid if isinstance(a, Laid)]
    assert before == after, "an input was modified"

    again = call()
    for name, one, two in zip(NAMES, got, again, strict=True):
        same = (one is None and two is None) or _bits(row, one) == _bits(row, two)
        assert same, f"{name}: a repeated call gives other bits"

    for name, array, expected in zip(NAMES, got, reference[:4], strict=True):
        if array is not None:
            _compare(name, row.to_numpy(array), expected)
    if case.activation is None:
        bias = 0 if values.bias is None else _of_elements(case, values.bias)
        exact = np.broadcast_to(bias, case.shape).astype(row.to_numpy(got[0]).dtype)
        wrong = reference.exact & (row.to_numpy(got[0]) != exact)
        assert not wrong.any(), "y: a constant group is not exactly the bias"
    y = row.to_numpy(got[0])
    assert not np.isnan(np.where(values.huge, y, 0)).any(), "y: NaN at finite padding"


def _of_elements(case: Case, parameter: np.ndarray) -> np.ndarray:
    varies = [*case.features, *([0] if case.per_sample else [])]
    shape = [n if a in varies else 1 for a, n in enumerate(case.shape)]
    return parameter.reshape(shape)


def _compare(name: str, actual: np.ndarray, expected: Expected) -> None:
    wide = widen(actual)
    with np.errstate(invalid="ignore"):
        error = abs(wide - expected.values)
        wrong = ~(error <= expected.allowed) & ~expected.undefined
    if wrong.any():
        ratio = np.where(wrong, error / expected.allowed, 0)
        at = np.unravel_index(np.nanargmax(np.where(np.isnan(ratio), np.inf, ratio)), ratio.shape)
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} elements; at {tuple(map(int, at))} "
            f"{actual[at]!r} instead of {expected.values[at]!r}, "
            f"an error of {float(ratio[at]):.3g} times what is allowed"
        )


def _arrays(case: Case, row: Row, values: Values) -> list[Any]:
    """Return x, dy, scale, bias and mask: `Laid`, or None, or a mask that is not an array."""
    where = ROWS["numpy"] if case.host_parameters else row
    arrays: list[Any] = [
        lay_out(row, values.x, case.layout, case.seed),
        lay_out(row, values.dy, case.dy_layout, case.seed),
    ]
    for parameter in (values.scale, values.bias):
        laid = None
        if parameter is not None:
            laid = lay_out(where, parameter, _layout_of_parameter(case), case.seed)
        arrays.append(laid)
    mask: Any = values.mask
    if mask is not None and case.mask_layout == "list" and (mask.size or mask.ndim < 2):
        mask = mask.astype(np.float64).tolist() if "float" in case.mask_dtype else mask.tolist()
    elif mask is not None and case.mask_layout == "broadcast" and case.library != "jax":
        mask = lay_out(row, mask, "C", case.seed)
        full = mask.array
        full = np.broadcast_to(full, case.shape) if case.library == "numpy" else full.expand(
            case.shape)  # fmt: skip
        mask = Laid(full, mask.base)
    elif mask is not None:
        home = ROWS["numpy"] if case.mask_layout == "host" else row
        mask = lay_out(home, mask, case.mask_layout, case.seed)
    return [*arrays, mask]


def _layout_of_parameter(case: Case) -> str:
    # A broadcast parameter has the same value everywhere, and the values are drawn without it.
    return "strided" if case.parameter_layout == "broadcast" else case.parameter_layout


def _bits(row: Row, a: Any) -> bytes:
    if not isinstance(a, np.ndarray):
        a = row.to_numpy(a)
    return np.ascontiguousarray(a).tobytes()


def _caller(case: Case, arrays: list[Any]) -> Callable[[], tuple[Any, ...] | None]:
    """Return a function that makes the call; JAX compiles it once."""
    if case.library == "jax":
        return _jax(case, arrays)
    return functools.partial(_call, case, arrays)


def _call(case: Case, arrays: list[Any]) -> tuple[Any, ...] | None:
    """Return y and the gradients; None if kernels were asked for and cannot compute the call."""
    keywords = case.keywords | {"implementation": case.implementation}
    x, dy, scale, bias, mask = arrays
    try:
        if case.how == "vjp":
            y, pullback = group_norm_vjp(x, scale, bias, mask=mask, **keywords)
            return y, *pullback(dy)
        return _torch_autodiff(x, dy, scale, bias, mask, keywords)
    except ArgumentValueError as error:
        if case.implementation == "fused" and "cannot compute this call" in str(error):
            return None
        raise


def _torch_autodiff(x, dy, scale, bias, mask, keywords):
    torch = importlib.import_module("torch")
    leaves = [a if a is None else a.detach().requires_grad_() for a in (x, scale, bias)]
    y = group_norm(*leaves, mask=mask, **keywords)
    wanted = [a for a in leaves if a is not None]
    grads = iter(torch.autograd.grad(y, wanted, dy))
    return y.detach(), *(None if a is None else next(grads) for a in leaves)


def _jax(case: Case, arrays: list[Any]) -> Callable[[], tuple[Any, ...]]:
    names = ("x", "dy", "scale", "bias", "mask")
    static = (case.how, tuple(sorted(case.keywords.items(), key=str)))
    host = {n for n, a in zip(names, arrays, strict=True) if not hasattr(a, "devices")}
    constants = {n: a for n, a in zip(names, arrays, strict=True) if n in host}
    traced = {n: a for n, a in zip(names, arrays, strict=True) if n not in host}
    if all(a is None for a in constants.values()):
        program = _jitted(static, tuple(sorted(constants)))
    else:
        jax = importlib.import_module("jax")
        program = jax.jit(functools.partial(_jax_call, static, constants))
    return functools.partial(program, traced)


@functools.lru_cache(maxsize=256)
def _jitted(static, absent: tuple[str, ...]):
    jax = importlib.import_module("jax")
    return jax.jit(functools.partial(_jax_call, static, dict.fromkeys(absent)))


def _jax_call(static, constants, traced):
    how, keywords = static
    keywords = dict(keywords) | {"implementation": "portable"}
    a = constants | traced
    if how == "autodiff":
        names = [name for name in ("x", "scale", "bias") if a[name] is not None]

        def forward(*given):
            absent = {"scale": None, "bias": None}
            chosen = absent | dict(zip(names, given, strict=True))
            return [group_norm(**chosen, mask=a["mask"], **keywords)]

        given = [a[name] for name in names]
        [y], found = ROWS["jax"].vjp(forward, given, range(len(given)), [a["dy"]])
        gradients = dict(zip(names, found, strict=True))
        return y, *(gradients.get(name) for name in ("x", "scale", "bias"))
    y, pullback = group_norm_vjp(a["x"], a["scale"], a["bias"], mask=a["mask"], **keywords)
    return y, *pullback(a["dy"])
