"""`layer.to_onnx`: the models, run by onnxruntime, against float64."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from groupnorm import GroupNorm
from groupnorm.arguments import ACTIVATIONS
from groupnorm.discovery import backend_info
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, CONTRACT_64, assert_close

# The bound for data of spread 1, without scale and bias.
BOUND = 1e-6
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def run(model, x):
    """Run a model by onnxruntime; bfloat16 is given and returned as bits."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    if x.dtype != BFLOAT16:
        return session.run(None, {"x": x})[0]
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        x.view(np.uint16), onnx.TensorProto.BFLOAT16
    )
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", value)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    (y,) = binding.get_outputs()
    return y


def randomize(layer, rng):
    for name in ("scale", "bias"):
        value = getattr(layer, name)
        setattr(layer, name, rng.normal(size=value.shape).astype(value.dtype))
    return layer


def expected(layer, x):
    """Return the result in float64, which has x's axes for the layer's feature axes."""
    y = oracle.group_norm(
        x.astype(np.float64), layer.scale, layer.bias, num_groups=layer.num_groups,
        feature_axis=layer._options.feature, epsilon=layer.epsilon,
        reduction_axes=layer.reduction_axes,
    )  # fmt: skip
    error = np.vectorize(math.erf)
    return {
        None: lambda: y,
        "relu": lambda: np.maximum(y, 0),
        "silu": lambda: y / (1 + np.exp(-y)),
        "gelu": lambda: y / 2 * (1 + error(y / math.sqrt(2))),
    }[layer.activation]()


# Accuracy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 32, 8, 8), 8),
        ((2, 64, 32, 32), 32),
        ((1, 320, 64, 64), 32),
        ((1, 8, 100_000), 4),
        ((2, 30, 24, 24), 1),
    ],
    ids=str,
)
def test_offsets(shape, groups, offset, rng):
    """A single sum in float32 for each mean has errors of 9e-6 in large groups."""
    layer = GroupNorm((shape[1], ...), feature_axis=0, num_groups=groups)
    x = (rng.normal(size=shape) + offset).astype(np.float32)
    y = run(layer.to_onnx(None, ("N", shape[1], *(None,) * (len(shape) - 2))), x)
    assert np.abs(y - expected(layer, x)).max() <= BOUND


def test_one_row_of_outliers(rng):
    layer = randomize(GroupNorm((8, ...), feature_axis=0, num_groups=2), rng)
    x = rng.normal(size=(3, 8, 40, 40)).astype(np.float32)
    x[:, 3, 7] += 1e4
    y = run(layer.to_onnx(None, ("N", 8, "H", "W")), x)
    assert_close(y, expected(layer, x), tolerance=CONTRACT)


# Layouts, options --------------------------------------------------------------------------------

LAYOUTS = {
    "first": ({"in_size": (8, ...), "feature_axis": 0}, ("N", 8, "H", "W"), (2, 8, 5, 6)),
    "volumes": ({"in_size": (8, ...), "feature_axis": 0}, ("N", 8, 3, "H", 5), (2, 8, 3, 4, 5)),
    "fixed": ({"in_size": (8, ...), "feature_axis": 0}, (2, 8, 5, 6), (2, 8, 5, 6)),
    "unnamed": ({"in_size": (8, ...), "feature_axis": 0}, (None, 8, None), (2, 8, 5)),
    "a list": ({"in_size": (8, ...), "feature_axis": 0}, ["N", np.int64(8), "L"], (2, 8, 5)),
    "last": ({"in_size": 8}, ("N", "H", "W", 8), (2, 5, 6, 8)),
    "2d": ({"in_size": 8}, ("N", 8), (5, 8)),
    "1d": ({"in_size": 8}, (8,), (8,)),
    "in the middle": ({"in_size": (5, 8, 6), "feature_axis": 1}, ("N", "A", 8, "B"), (2, 5, 8, 6)),
    "two axes": ({"in_size": (4, 5, 2), "feature_axis": (0, 2)}, ("N", 4, "L", 2), (3, 4, 5, 2)),
    "adjacent": ({"in_size": (4, 2, ...), "feature_axis": (0, 1)}, ("N", 4, 2, "L"), (3, 4, 2, 7)),
    "batch": ({"in_size": (8, ...), "feature_axis": 0, "reduction_axes": (0, 1, 2)},
              ("N", 8, "L"), (3, 8, 5)),
    "features only": ({"in_size": 8, "reduction_axes": -1}, ("N", "H", "W", 8), (2, 5, 6, 8)),
    "kept behind": ({"in_size": (8, ...), "feature_axis": 0, "reduction_axes": (1, 2)},
                    ("N", 8, "H", "W"), (2, 8, 5, 6)),
    "one channel each": ({"in_size": (8, ...), "feature_axis": 0, "num_groups": 8},
                         ("N", 8, "L"), (3, 8, 50)),
    "one group": ({"in_size": 8, "num_groups": 1}, ("N", "L", 8), (3, 50, 8)),
}  # fmt: skip


@pytest.mark.parametrize("opset", [18, 21, 25])
@pytest.mark.parametrize(("keywords", "shape", "size"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(keywords, shape, size, opset, rng):
    layer = randomize(GroupNorm(**{"num_groups": 4, **keywords}), rng)
    model = layer.to_onnx(None, shape, opset=opset)
    assert model.opset_import[0].version == opset
    for offset in (0.0, 1e4):
        x = (rng.normal(size=size) + offset).astype(np.float32)
        assert_close(run(model, x), expected(layer, x), tolerance=CONTRACT)
        assert_close(ReferenceEvaluator(model).run(None, {"x": x})[0], expected(layer, x),
                     tolerance=CONTRACT)  # fmt: skip


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(("scale", "bias"), [(True, True), (True, False), (False, True)])
def test_options(scale, bias, activation, rng):
    layer = GroupNorm(
        (..., 8), num_groups=2, epsilon=0.1, activation=activation, use_scale=scale, use_bias=bias,
        scale_init=lambda s, d: rng.normal(size=s), bias_init=lambda s, d: rng.normal(size=s),
    )  # fmt: skip
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    y = run(layer.to_onnx(None, ("N", "L", 8)), x)
    assert_close(y, expected(layer, x), tolerance=CONTRACT)


def test_size_of_the_graph():
    """For channels first; other layouts add two transpositions."""
    layer = GroupNorm((8, ...), feature_axis=0, num_groups=2)
    assert len(layer.to_onnx(None, ("N", 8, "H", "W")).graph.node) == 18
    assert len(GroupNorm(8, num_groups=2).to_onnx(None, ("N", "H", "W", 8)).graph.node) == 20


# Dtypes ------------------------------------------------------------------------------------------

DTYPES = {
    "float64": CONTRACT_64, "float32": CONTRACT, "float16": 2**-10, "bfloat16": 2**-7
}  # fmt: skip


@pytest.mark.parametrize("evaluate", ["onnxruntime", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_in_the_dtype_of_x(dtype, evaluate, rng):
    layer = randomize(GroupNorm((..., 8), num_groups=2, dtype="input"), rng)
    x = (rng.normal(size=(2, 30, 8)) + 50).astype(layer._adapter_for(np.ones(1)).dtype(dtype))
    model = layer.to_onnx(None, ("N", "L", 8), dtype=dtype)
    if evaluate == "reference":
        y = ReferenceEvaluator(model).run(None, {"x": x})[0]
    else:
        y = run(model, x)
        if dtype == "bfloat16":
            assert y.element_type() == onnx.TensorProto.BFLOAT16
            model.graph.node.append(onnx.helper.make_node("Cast", ["y"], ["wide"], to=1))
            model.graph.output[0].name = "wide"
            model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                x.view(np.uint16), onnx.TensorProto.BFLOAT16
            )
            y = session.run_with_ort_values(None, {"x": value})[0].numpy().astype(x.dtype)
    assert y.dtype == x.dtype
    assert_close(y.astype(np.float64), expected(layer, x), tolerance=DTYPES[dtype])


@pytest.mark.parametrize(
    ("x", "parameters", "dtype"),
    [
        ("float16", "float32", None),
        ("float16", "float16", None),
        ("float32", "float64", None),
        ("float64", "float32", None),
        ("float32", "float32", "float64"),
        ("float64", "float64", "float32"),
        ("float64", "float16", "input"),
        ("float32", "bfloat16", None),
    ],
)
def test_dtype_of_the_result_is_that_of_the_layer(x, parameters, dtype, rng):
    layer = GroupNorm((..., 8), num_groups=2, param_dtype=parameters, dtype=dtype)
    x = rng.normal(size=(2, 30, 8)).astype(x)
    y, want = run(layer.to_onnx(None, ("N", "L", 8), dtype=x.dtype), x), layer(x)
    assert y.dtype == want.dtype
    assert_close(y.astype(np.float64), want.astype(np.float64), tolerance=DTYPES[y.dtype.name])


# Layers of every backend, files ------------------------------------------------------------------


@pytest.mark.parametrize(
    "library",
    [
        "numpy",
        *(pytest.param(n, marks=pytest.mark.needs(n)) for n in ("jax", "torch")),
        pytest.param("cupy", marks=[pytest.mark.needs("cupy"), pytest.mark.gpu]),
    ],
)
def test_every_backend(library, rng, tmp_path):
    if library == "cupy" and not backend_info("cupy").devices:
        pytest.skip("no GPU that CuPy can use")
    layer = randomize(GroupNorm((8, ...), feature_axis=0, num_groups=2, epsilon=1e-3), rng)
    path = tmp_path / "layer.onnx"
    model = layer.to_backend(library).to_onnx(path, ("N", 8, "H", "W"))
    assert onnx.load(path) == model
    x = (rng.normal(size=(2, 8, 6, 5)) + 1e4).astype(np.float32)
    y = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert_close(y[0], expected(layer, x), tolerance=CONTRACT)


# Errors ------------------------------------------------------------------------------------------

ERRORS = {
    "axis_name": ({"axis_name": "i"}, ("N", 8), {}, r"axis_name='i'.*without axis_name"),
    "opset": ({}, ("N", 8), {"opset": 17}, "opset=17.*choose 18 to"),
    "future opset": ({}, ("N", 8), {"opset": 1000}, "opset=1000.*installed onnx"),
    "no opset": ({}, ("N", 8), {"opset": 18.0}, r"opset=18\.0 is of type float"),
    "dtype": ({}, ("N", 8), {"dtype": "complex64"}, "x has dtype complex64.*float32"),
    "parameters": ({"param_dtype": "complex64"}, ("N", 8), {}, "scale has dtype complex64"),
    "result": ({"dtype": "complex64"}, ("N", 8), {}, "y has dtype complex64"),
    "no dtype": ({}, ("N", 8), {"dtype": "int32"}, "dtype='int32' is not a floating dtype"),
    "a number": ({}, 8, {}, r"shape=8 is of type int.*'N', 64"),
    "a name": ({}, "N8", {}, "shape='N8' is of type str"),
    "an entry": ({}, ("N", 8.0), {}, r"shape=.*holds 8\.0"),
    "an empty axis": ({}, (0, 8), {}, "holds 0"),
    "no channels": ({}, ("N", "C"), {}, r"lengths \('C',\).*must be \(8,\)"),
    "other channels": ({}, ("N", 6), {}, r"lengths \(6,\).*must be \(8,\)"),
    "any rank": ({}, ("N", ..., 8), {}, "leaves the number of axes open"),
    "axes": ({"reduction_axes": (1, 3)}, ("N", "L", 8), {}, "reduction_axes=3 is out of range"),
}


@pytest.mark.parametrize(("keywords", "shape", "how", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(keywords, shape, how, match, tmp_path):
    layer = GroupNorm(8, num_groups=2, **keywords)
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=match):
        layer.to_onnx(tmp_path / "layer.onnx", shape, **how)
    assert not list(tmp_path.iterdir())
