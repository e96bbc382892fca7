"""The cases of ONNX's tests of `GroupNormalization`, operator sets 18 and 21, and its equivalents.

They are run by ONNX's reference evaluator and by onnxruntime, which both expand the operator as its
specification has it. Instance and layer normalization have the cases that are group norms.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, version_converter
from onnx.reference import ReferenceEvaluator

from groupnorm import group_norm
from groupnorm.errors import ArgumentValueError
from groupnorm.testing import oracle
from tests.peers.compare import (
    HALF,
    Case,
    Difference,
    assert_all_agree,
    assert_differs,
    assert_listed,
    assert_same_error,
)
from tests.rows import CONTRACT, CONTRACT_64

DIFFERENT_ON_PURPOSE = {
    "large_mean": Difference(
        "mean 1e4 times the spread",
        "NaN: the specified variance E[x²] − E[x]² becomes negative",
        "errors below 5e-6",
        "NaN",
    ),
    "huge_values": Difference("values of 1e20", "0: their squares overflow", "normalized", 0.9),
    "double_precision": Difference(
        "float64 input with the default `stash_type`",
        "computed in float32",
        "computed in float64",
        1e-8,
    ),
    "half_precision_stash": Difference(
        "`stash_type` float16 or bfloat16",
        "errors above 5e-4",
        "at least float32, always",
        5e-4,
    ),
    "empty_samples": Difference("samples without positions", "raises", "empty results", "raises"),
    "empty_batch": Difference("an empty batch", "raises", "an empty result", "raises"),
    "parameters_per_group": Difference(
        "scale and bias per group (operator set 18, deprecated for it)",
        "accepts them",
        "raises: parameters are per channel; repeat them",
        "accepts",
    ),
    "conversion": Difference(
        "a model of operator set 18, converted to 21",
        "raises when run: the parameters are not repeated",
        "takes repeated parameters",
        "raises",
    ),
    "indivisible_channels": Difference(
        "a `num_groups` that does not divide the channels",
        "the checker accepts the model",
        "raises",
        "accepts",
    ),
    "negative_epsilon": Difference(
        "`epsilon=-2.0`", "accepts it; NaN where the variance is smaller", "raises", "accepts"
    ),
}

KINDS = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


def model_of(operator, x, *parameters, opset=21, **attributes):
    """Return a model of one node, for arrays of these shapes and dtypes."""
    arrays = dict(zip(("x", "scale", "bias"), (x, *parameters), strict=True))
    inputs = [
        helper.make_tensor_value_info(name, KINDS[a.dtype.name], a.shape)
        for name, a in arrays.items()
    ]
    output = helper.make_tensor_value_info("y", KINDS[x.dtype.name], x.shape)
    node = helper.make_node(operator, list(arrays), ["y"], **attributes)
    graph = helper.make_graph([node], "graph", inputs, [output])
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def evaluate(model, *arrays):
    """Run a model by ONNX's reference evaluator."""
    feed = dict(zip(("x", "scale", "bias"), arrays, strict=True))
    return ReferenceEvaluator(model).run(None, feed)[0]


def run(model, *arrays):
    """Run a model by onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(zip(("x", "scale", "bias"), arrays, strict=True)))[0]


RUNNERS = pytest.mark.parametrize("runner", [evaluate, run])


def draw(rng, *shape, dtype="float32"):
    return rng.normal(size=shape).astype(dtype)


def check(runner, arrays, *, num_groups, epsilon=None, tolerance=2 * CONTRACT, **attributes):
    if epsilon is not None:
        attributes["epsilon"] = epsilon
    model = model_of("GroupNormalization", *arrays, num_groups=num_groups, **attributes)
    onnx.checker.check_model(model, full_check=True)
    options = {
        "num_groups": num_groups,
        "epsilon": float(np.float32(1e-5 if epsilon is None else epsilon)),  # as attributes are
        "feature_axis": 1,
    }
    want = oracle.group_norm(*arrays, **options)
    theirs = runner(model, *arrays)
    assert_all_agree(theirs, group_norm(*arrays, **options), want, tolerance=tolerance)


@RUNNERS
@pytest.mark.parametrize("epsilon", [None, 1e-2], ids=str)
def test_example(epsilon, runner, rng):
    """The two tests of the operator: its default epsilon, and another one."""
    arrays = (draw(rng, 3, 4, 2, 2), *draw(rng, 2, 4))
    check(runner, arrays, num_groups=2, epsilon=epsilon)


@RUNNERS
@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (2, 6, 4, 5), (2, 6, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("num_groups", [1, 3, 6])
def test_every_rank(num_groups, shape, runner, rng):
    """A group of one value (no positions and 6 groups) is 0 before the bias."""
    check(runner, (draw(rng, *shape), *draw(rng, 2, 6)), num_groups=num_groups)


@RUNNERS
@pytest.mark.parametrize(
    ("dtype", "stash"),
    [("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_dtypes_and_precision_of_statistics(dtype, stash, runner, rng):
    """ONNX says in which precision statistics are taken; here it is at least float32."""
    arrays = (draw(rng, 3, 6, 4, 5, dtype=dtype), *draw(rng, 2, 6, dtype=dtype))
    tolerance = HALF.get(dtype, 2 * CONTRACT_64 if dtype == "float64" else 2 * CONTRACT)
    check(runner, arrays, num_groups=3, stash_type=KINDS[stash], tolerance=tolerance)


@RUNNERS
@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
def test_instance_normalization_is_one_channel_per_group(epsilon, runner, rng):
    arrays = (draw(rng, 2, 3, 4, 5), *draw(rng, 2, 3))
    model = model_of("InstanceNormalization", *arrays, epsilon=epsilon)
    options = {"num_groups": 3, "feature_axis": 1, "epsilon": epsilon}
    ours, want = group_norm(*arrays, **options), oracle.group_norm(*arrays, **options)
    assert_all_agree(runner(model, *arrays), ours, want)


@RUNNERS
@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-1])
def test_layer_normalization_is_one_group(epsilon, axis, runner, rng):
    """Of all axes from `axis` on, which are the features and are normalized."""
    x = draw(rng, 2, 3, 4, 5)
    scale, bias = draw(rng, 2, *x.shape[axis:])
    model = model_of("LayerNormalization", x, scale, bias, axis=axis, epsilon=epsilon)
    axes = tuple(range(4))[axis:]
    options = {"num_groups": 1, "feature_axis": axes, "reduction_axes": axes, "epsilon": epsilon}
    ours, want = group_norm(x, scale, bias, **options), oracle.group_norm(x, scale, bias, **options)
    assert_all_agree(runner(model, x, scale, bias), ours, want)


@RUNNERS
def test_operator_set_18_has_parameters_per_group(runner, rng):
    """They are ours when repeated for the channels of their group."""
    x, (scale, bias) = draw(rng, 3, 4, 2, 2), draw(rng, 2, 2)
    model = model_of("GroupNormalization", x, scale, bias, opset=18, num_groups=2)
    repeated = (np.repeat(scale, 2), np.repeat(bias, 2))
    options = {"num_groups": 2, "feature_axis": 1, "epsilon": 1e-5}
    ours, want = group_norm(x, *repeated, **options), oracle.group_norm(x, *repeated, **options)
    assert_all_agree(runner(model, x, scale, bias), ours, want)


@RUNNERS
@pytest.mark.parametrize(("shape", "num_groups"), [((2, 4, 8), 3), ((2, 4, 8), -2)], ids=str)
def test_invalid_groups(shape, num_groups, runner, rng):
    arrays = (draw(rng, *shape), *draw(rng, 2, 4))
    model = model_of("GroupNormalization", *arrays, num_groups=num_groups)
    assert_same_error(
        lambda: runner(model, *arrays),
        lambda: group_norm(*arrays, num_groups=num_groups, feature_axis=1),
        match=f"num_groups={num_groups}",
        peer=Exception,  # onnxruntime's errors derive from nothing narrower
    )


# Differences ---------------------------------------------------------------------------------


def values(x, runner, tolerance=2 * CONTRACT, **attributes) -> Case:
    parameters = (np.ones(4, x.dtype), np.zeros(4, x.dtype))
    model = model_of("GroupNormalization", x, *parameters, num_groups=2, **attributes)
    options = {"num_groups": 2, "epsilon": 1e-5, "feature_axis": 1}
    return Case(
        lambda: runner(model, x, *parameters),
        lambda: group_norm(x, *parameters, **options),
        oracle.group_norm(x, *parameters, **options),
        tolerance,
    )


def large_mean(rng, runner):
    return values(draw(rng, 2, 4, 8, 8) + np.float32(1e4), runner)


def huge_values(rng, runner):
    return values(np.float32(1e20) * draw(rng, 2, 4, 8, 8), runner)


def double_precision(rng, runner):
    return values(draw(rng, 2, 4, 8, 8, dtype="float64"), runner, 2 * CONTRACT_64)


def half_precision_stash(rng, runner):
    """onnxruntime has no bfloat16 for it."""
    return values(draw(rng, 2, 4, 8, 8), runner, stash_type=KINDS["float16"])


def empty_samples(rng, runner):
    return values(draw(rng, 2, 4, 0, 8), runner)


def empty_batch(rng, runner):
    return values(draw(rng, 0, 4, 8), runner)


def per_group(rng, runner, convert, case) -> Case:
    x, (scale, bias) = draw(rng, 3, 4, 2, 2), draw(rng, 2, 2)
    model = convert(model_of("GroupNormalization", x, scale, bias, opset=18, num_groups=2))
    return case(lambda: runner(model, x, scale, bias), x, scale, bias)


def parameters_per_group(rng, runner):
    def case(theirs, x, scale, bias):
        ours = {"num_groups": 2, "feature_axis": 1}
        return Case(theirs, lambda: group_norm(x, scale, bias, **ours), ArgumentValueError)

    return per_group(rng, runner, lambda model: model, case)


def conversion(rng, runner):
    def case(theirs, x, scale, bias):
        arrays = (x, np.repeat(scale, 2), np.repeat(bias, 2))
        options = {"num_groups": 2, "feature_axis": 1, "epsilon": 1e-5}
        want = oracle.group_norm(*arrays, **options)
        return Case(theirs, lambda: group_norm(*arrays, **options), want)

    return per_group(rng, runner, lambda model: version_converter.convert_version(model, 21), case)


def indivisible_channels(rng, runner):
    arrays = (draw(rng, 2, 4, 8), *draw(rng, 2, 4))
    model = model_of("GroupNormalization", *arrays, num_groups=3)
    return Case(
        lambda: onnx.checker.check_model(model, full_check=True),
        lambda: group_norm(*arrays, num_groups=3, feature_axis=1),
        ArgumentValueError,
    )


def negative_epsilon(rng, runner):
    arrays = (draw(rng, 2, 4, 8), *draw(rng, 2, 4))
    model = model_of("GroupNormalization", *arrays, num_groups=2, epsilon=-2.0)
    return Case(
        lambda: runner(model, *arrays),
        lambda: group_norm(*arrays, num_groups=2, feature_axis=1, epsilon=-2.0),
        ArgumentValueError,
    )


@RUNNERS
@pytest.mark.parametrize("name", DIFFERENT_ON_PURPOSE)
def test_different_on_purpose(name, runner, rng):
    assert_differs(DIFFERENT_ON_PURPOSE[name], globals()[name](rng, runner))


def test_the_page_lists_these_differences():
    assert_listed("ONNX", DIFFERENT_ON_PURPOSE)
