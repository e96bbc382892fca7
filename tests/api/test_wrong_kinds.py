"""Each argument with each kind of value: it works, or an error of the library names the argument.

The arguments are read from the signatures, so that new ones are tested without being listed here.
"""

from __future__ import annotations

import datetime
import inspect

import numpy as np
import pytest

import groupnorm
from groupnorm.dispatch import layer_class_named
from groupnorm.errors import GroupNormError
from tests.conftest import SELECTED
from tests.rows import ROWS

SHAPE = (2, 6, 8)
KINDS = {
    "None": None,
    "True": True,
    "object": object(),
    "class": int,
    "function": len,
    "text": "what",
    "bytes": b"ab",
    "date": datetime.date(2024, 1, 1),
    "zero": 0,
    "negative": -1,
    "huge": 10**30,
    "fraction": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "imaginary": 1j,
    "empty list": [],
    "list of an object": [object()],
    "ragged list": [[1], [2, 3]],
    "tuple of text": ("a", "b"),
    "dictionary": {"a": 1},
    "set": {1, 2},
    "range": range(3),
    "NumPy integer": np.int64(3),
    "NumPy number": np.float32(2),
    "array of objects": np.array([object()]),
    "array of text": np.array(["a"]),
    "dates": np.zeros(8, "M8[s]"),
    "masked array": np.ma.masked_array(np.ones(SHAPE, np.float32), mask=False),
    "complex array": np.ones(SHAPE, np.complex64),
    "integers": np.ones(SHAPE, np.int32),
    "another shape": np.ones(3, np.float32),
    "structured array": np.zeros(SHAPE, [("a", "i4"), ("b", "f4")]),
    "records": np.rec.array(np.zeros(SHAPE, [("a", "i4")])),
    "bytes without a type": np.zeros(SHAPE, "V4"),
    "extended precision": np.ones(8, np.longdouble),
    "no axes": np.ones((), np.float32),
    "no elements": np.ones((0,), np.float32),
}
# What these functions of the caller raise is theirs.
CALLED = ("scale_init", "bias_init", "param_type")
FUNCTIONS = ("group_norm", "group_norm_vjp", "group_statistics", "normalize")


def parameters(function):
    """Return the names of a function's parameters, without self, *args and **kwargs."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def check(call, name, *others):
    """Call with each kind; an error must be the library's, and name the argument."""
    raised = 0
    for kind, value in KINDS.items():
        if name in CALLED and callable(value):
            continue
        message = None
        try:
            call(**{name: value})
        except GroupNormError as error:
            message = str(error)
        except Exception as error:
            pytest.fail(f"{name}={kind}: {type(error).__name__}: {error}")
        if message is not None:
            raised += 1
            assert any(word in message for word in (name, *others)), (kind, message)
    return raised


@pytest.fixture
def x(quick_backend, rng):
    return quick_backend.asarray(rng.normal(size=SHAPE).astype(np.float32))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_arguments_of_functions(function, quick_backend, x):
    call = getattr(groupnorm, function)
    given = {"x": x, "num_groups": 2}
    if function == "normalize":
        given["statistics"] = groupnorm.group_statistics(x, num_groups=2)
    raised = {}
    for name in parameters(call):
        # An x of another shape may have no axis, or another number of channels.
        others = ("feature_axis", "num_groups") if name == "x" else ()
        raised[name] = check(lambda **wrong: call(**{**given, **wrong}), name, *others)
    assert min(raised.values()) > 2, raised
    assert "x" in raised


@pytest.mark.parametrize("backend_name", ["numpy", *("torch", "jax", "mlx")])
def test_arguments_of_layers(backend_name, request):
    row = ROWS[backend_name]
    if row not in request.config.stash[SELECTED]:
        pytest.skip(f"--backends excludes {backend_name}")
    names = parameters(layer_class_named(backend_name).__init__)
    assert {"in_size", "num_groups", "epsilon", "param_type"} <= set(names)

    def call(**wrong):
        return groupnorm.GroupNorm(
            **{"in_size": 8, "num_groups": 2, "backend": row.library, **wrong}
        )

    for name in (*names, "backend"):
        check(call, name, "num_groups", "group_size")


def test_arguments_of_calls(quick_backend, x):
    if quick_backend.library not in ("numpy", "torch"):
        pytest.skip("layers exist in NumPy, PyTorch, JAX, CuPy and MLX")
    layer = groupnorm.GroupNorm(8, num_groups=2, backend=quick_backend.library)
    _, pullback = layer.vjp(x)
    for call in (layer, layer.vjp):
        for name in ("x", "mask"):
            check(lambda call=call, **wrong: call(**{"x": x, **wrong}), name, "in_size", "feature")
    assert check(lambda dy: pullback(dy), "dy") > 20
