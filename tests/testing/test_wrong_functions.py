"""Functions that are wrong on purpose, each in one row, are caught; the message says where."""

from __future__ import annotations

from typing import Any

import array_api_compat
import jax
import numpy as np
import pytest
import torch

from groupnorm import testing

SHAPE = (4, 6)


def namespace(x: Any) -> Any:
    return array_api_compat.array_namespace(x)


def softmax(x):
    xp = namespace(x)
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def inputs():
    return testing.hard_inputs(SHAPE, names=("normal", "offset 1e3", "ramp"))


def is_traced(x) -> bool:
    """Whether JAX or PyTorch compiles the calling function."""
    return torch.compiler.is_compiling() or isinstance(x, jax.core.Tracer)


# Each returns a wrong result of the softmax.
def wrong_dtype(x):
    return namespace(x).astype(softmax(x), namespace(x).float64)


def wrong_library(x):
    return np.asarray(softmax(x))


def wrong_shape(x):
    return namespace(x).expand_dims(softmax(x), axis=0)


def wrong_transposed(x):
    return softmax(x).T


def wrong_axis(x):
    return softmax(x.T).T


def wrong_everywhere(x):
    return softmax(x) * 1.0001


def wrong_element(x):
    y = namespace(x).asarray(softmax(x), copy=True)
    y[2, 3] += 1e-4
    return y


def wrong_largest(x):
    xp = namespace(x)
    return softmax(x - 1e-3 * xp.astype(x == xp.max(x), x.dtype))


def wrong_nan(x):
    y = namespace(x).asarray(softmax(x), copy=True)
    y[0, 0] = float("nan")
    return y


def wrong_raises(x):
    raise RuntimeError("no such operation")


def wrong_more_results(x):
    return softmax(x), x


def wrong_without_maximum(x):
    xp = namespace(x)
    e = xp.exp(x)
    return e / xp.sum(e, axis=-1, keepdims=True)


def wrong_digits(x):
    """Adds in half precision."""
    xp = namespace(x)
    return softmax(xp.astype(xp.astype(x, xp.float16), xp.float32))


def wrong_writes(x):
    y = softmax(x)
    x[0, 0] = 0
    return y


def wrong_if_compiled(x):
    return softmax(x) * (1.001 if is_traced(x) else 1.0)


CASES = {
    "dtype": (wrong_dtype, "numpy", "dtype", "float64 instead of float32"),
    "library": (wrong_library, "torch", "library", "numpy.ndarray is not an array of torch"),
    "one axis more": (wrong_shape, "array_api_strict", "shape", r"\(1, 4, 6\) instead of"),
    "transposed": (wrong_transposed, "jax:jit", "shape", r"\(6, 4\) instead of \(4, 6\)"),
    "another axis": (wrong_axis, "torch", "value", "instead of"),
    "a factor": (wrong_everywhere, "jax", "value", "units in the last place"),
    "one element": (wrong_element, "numpy", "value", r"at \[2, 3\]"),
    "the largest element": (wrong_largest, "dask", "value", "instead of"),
    "NaN": (wrong_nan, "torch", "value", r"nan instead of .* at \[0, 0\]"),
    "raises": (wrong_raises, "dask", "raised", "RuntimeError: no such operation"),
    "two results": (
        wrong_more_results,
        "torch:compile",
        "results",
        r"result\[1\] instead of one",
    ),
    "overflow": (wrong_without_maximum, "jax:jit", "value", "nan instead of"),
    "digits": (wrong_digits, "torch", "value", "offset 1e3"),
    "writes to its input": (wrong_writes, "torch", "input changed", "wrote to its input"),
    "compiled by JAX": (wrong_if_compiled, "jax:jit", "value", "jax:jit"),
    "compiled by PyTorch": (wrong_if_compiled, "torch:compile", "value", "torch:compile"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_function_is_caught(name):
    wrong, row, what, message = CASES[name]
    functions = {r.name: softmax for r in testing.rows(["numpy", "torch", "array_api_strict"])}
    report = testing.check(
        functions | {row: wrong}, inputs=inputs(), reference=softmax, rows=[*functions, row]
    )
    assert {finding.row for finding in report.wrong} == {row}
    assert what in {finding.what for finding in report.wrong}
    with pytest.raises(testing.Disagreement, match=message) as caught:
        report.raise_if_wrong()
    assert row in str(caught.value)
    assert any(repr(given) in str(caught.value) for given in inputs())


def test_a_wrong_gradient_in_jax():
    @jax.custom_vjp
    def wrong(x):
        return softmax(x)

    wrong.defvjp(lambda x: (softmax(x), softmax(x)), lambda y, dy: (y * dy,))
    report = testing.check(
        {"jax": wrong, "torch": softmax}, inputs=inputs(), reference=softmax, rows=["jax", "torch"]
    )
    assert {(f.row, f.what) for f in report.wrong} == {("jax", "gradient")}
    assert "gradient of argument 0" in str(report.wrong[0])


def test_a_gradient_that_is_lost_in_pytorch():
    report = testing.check(
        lambda x: softmax(x.detach()), inputs=inputs(), reference=softmax, rows=["torch"]
    )
    assert {(f.row, f.what) for f in report.wrong} == {("torch", "gradient")}


def masked_mean(x, mask):
    xp = namespace(x)
    return xp.sum(xp.where(mask, x, 0.0)) / xp.sum(xp.astype(mask, x.dtype))


def leaking_mean(x, mask):
    xp = namespace(x)
    mask = xp.astype(mask, x.dtype)
    return xp.sum(x * mask) / xp.sum(mask)


def test_padding_that_leaks(rng):
    mask = rng.random(SHAPE) < 0.7
    x = testing.pad_with_nan(testing.hard_inputs(SHAPE)["normal"], mask)
    right = testing.check(masked_mean, inputs=(x, mask), rows=["numpy", "jax:jit", "torch"])
    right.raise_if_wrong()
    report = testing.check(
        {"numpy": masked_mean, "jax": masked_mean, "torch": leaking_mean},
        inputs=(x, mask), rows=["numpy", "jax:jit", "torch"],
    )  # fmt: skip
    assert {f.row for f in report.wrong} == {"torch"}
    assert "nan instead of" in str(report.wrong[0])


def test_an_order_of_sums_that_loses_digits():
    def mean(x):
        return namespace(x).sum(x) / x.shape[0]

    def in_sequence(x):
        total = x[0] - x[0]
        for value in x:
            total = total + value
        return total / x.shape[0]

    x = testing.hard_inputs((40000,), names=("offset 1e4",))
    functions = {"numpy": mean, "numpy:readonly": in_sequence}
    report = testing.check(functions, inputs=x, rows="numpy:*", bound=1e-6)
    assert {f.row for f in report.wrong} == {"numpy:readonly"}
