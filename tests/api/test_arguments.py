"""Wrong arguments: the type of the error, the argument and value it names, and the fix."""

import importlib
import re

import numpy as np
import pytest

from groupnorm import GroupNorm, errors, group_norm, group_norm_vjp, initializers
from tests.rows import ROWS

VALUE, TYPE = errors.ArgumentValueError, errors.ArgumentTypeError
X = np.arange(2 * 4 * 5 * 6, dtype=np.float32).reshape(2, 4, 5, 6)

# Arguments, the error, and what its message must contain.
GROUPS = [
    ({"num_groups": 0}, VALUE, "num_groups=0"),
    ({"num_groups": -3}, VALUE, "num_groups=-3"),
    ({"num_groups": 4}, VALUE, "num_groups=4", "6"),
    ({"num_groups": 7}, VALUE, "num_groups=7", "6"),
    ({"num_groups": 2.0}, TYPE, "num_groups=2.0"),
    ({"num_groups": True}, TYPE, "num_groups=True"),
    ({"num_groups": np.bool_(True)}, TYPE, "num_groups", "True"),
    ({"num_groups": "2"}, TYPE, "num_groups='2'"),
    ({"num_groups": [2]}, TYPE, "num_groups=[2]"),
    ({"num_groups": None}, VALUE, "num_groups=None", "group_size=None"),
    ({"num_groups": 2, "group_size": 3}, VALUE, "num_groups=2", "group_size=3"),
    ({"num_groups": None, "group_size": 0}, VALUE, "group_size=0"),
    ({"num_groups": None, "group_size": -2}, VALUE, "group_size=-2"),
    ({"num_groups": None, "group_size": 4}, VALUE, "group_size=4", "6"),
    ({"num_groups": None, "group_size": 3.0}, TYPE, "group_size=3.0"),
    ({"num_groups": None, "group_size": True}, TYPE, "group_size=True"),
]
COMMON = [
    ({"epsilon": -1e-6}, VALUE, "epsilon=-1e-06"),
    ({"epsilon": float("nan")}, VALUE, "epsilon=nan"),
    ({"epsilon": float("inf")}, VALUE, "epsilon=inf"),
    ({"epsilon": True}, TYPE, "epsilon=True"),
    ({"epsilon": "1e-6"}, TYPE, "epsilon='1e-6'"),
    ({"epsilon": 1e-6j}, TYPE, "epsilon=1e-06j"),
    ({"epsilon": None}, TYPE, "epsilon=None"),
    ({"dtype": "int32"}, TYPE, "dtype='int32'"),
    ({"dtype": np.int64}, TYPE, "dtype=", "int64"),
    ({"dtype": "bool"}, TYPE, "dtype='bool'"),
    ({"dtype": "float31"}, TYPE, "dtype='float31'"),
    ({"dtype": "inputs"}, TYPE, "dtype='inputs'"),
    ({"dtype": 3.5}, TYPE, "dtype=3.5"),
    ({"use_fast_variance": 1}, TYPE, "use_fast_variance=1"),
    ({"axis_index_groups": [[0, 1]]}, VALUE, "axis_index_groups=[[0, 1]]", "axis_name"),
]
AXES = [
    ({"feature_axis": 4}, VALUE, "feature_axis=4", "(2, 4, 5, 6)"),
    ({"feature_axis": -5}, VALUE, "feature_axis=-5", "(2, 4, 5, 6)"),
    ({"feature_axis": (1, 1)}, VALUE, "feature_axis=(1, 1)"),
    ({"feature_axis": (-1, 3)}, VALUE, "feature_axis=(-1, 3)"),
    ({"feature_axis": ()}, VALUE, "feature_axis=()"),
    ({"feature_axis": 1.0}, TYPE, "feature_axis=1.0"),
    ({"feature_axis": True}, TYPE, "feature_axis=True"),
    ({"feature_axis": "last"}, TYPE, "feature_axis='last'"),
    ({"feature_axis": None}, TYPE, "feature_axis=None"),
    ({"reduction_axes": (1, 2)}, VALUE, "reduction_axes=(1, 2)", "feature axis"),
    ({"reduction_axes": ()}, VALUE, "reduction_axes=()", "feature axis"),
    ({"reduction_axes": (1, 9)}, VALUE, "reduction_axes", "9", "(2, 4, 5, 6)"),
    ({"reduction_axes": (1, -1, 3)}, VALUE, "reduction_axes=(1, -1, 3)"),
    ({"reduction_axes": (1.0, -1)}, TYPE, "reduction_axes", "1.0"),
    ({"reduction_axes": True}, TYPE, "reduction_axes=True"),
    ({"reduction_axes": "all"}, TYPE, "reduction_axes='all'"),
]
MASKS = [
    ({"mask": np.ones((3, 1, 1, 1), bool)}, VALUE, "mask", "(3, 1, 1, 1)", "(2, 4, 5, 6)"),
    ({"mask": np.ones((2, 4, 5), bool)}, VALUE, "mask", "(2, 4, 5)"),
    ({"mask": np.ones((1, 2, 4, 5, 6), bool)}, VALUE, "mask", "(1, 2, 4, 5, 6)"),
    ({"mask": np.ones((2, 4, 5, 0), bool)}, VALUE, "mask", "(2, 4, 5, 0)"),
    ({"mask": [0, 1, 2, 1, 0, 1]}, VALUE, "mask", "2"),
    ({"mask": [0.5] * 6}, VALUE, "mask", "0.5"),
    ({"mask": np.full(6, -1)}, VALUE, "mask", "-1"),
    ({"mask": np.full(6, np.nan)}, VALUE, "mask", "nan"),
    ({"mask": [[True], [True, False]]}, TYPE, "mask"),
    ({"mask": "yes"}, TYPE, "mask='yes'"),
    ({"mask": np.ones(6, complex)}, TYPE, "mask", "complex|1.\\+0.j"),
    ({"mask": np.array([None] * 6)}, TYPE, "mask", "None"),
    ({"mask": {1, 2}}, TYPE, "mask", "{1, 2}"),
]
PARAMETERS = [
    ({"scale": np.ones(5, np.float32)}, VALUE, "scale", "(5,)", "(6,)"),
    ({"bias": np.ones((1, 6), np.float32)}, VALUE, "bias", "(1, 6)", "(6,)"),
    ({"scale": np.float32(2)}, "either", "scale"),
    ({"scale": [1.0] * 6}, TYPE, "scale", "list"),
    ({"bias": 1.0}, TYPE, "bias", "float"),
    ({"feature_axis": (1, 3), "scale": np.ones((6, 4))}, VALUE, "scale", "(6, 4)", "(4, 6)"),
]


def identify(case):
    keywords = ", ".join(f"{k}={v!r}" for k, v in case[0].items())
    # Addresses differ between pytest-xdist's workers.
    return re.sub(r" at 0x\w+|\s+", " ", keywords)[:60]


def assert_raises(call, kind, *fragments):
    """Assert the error's classes and that its message names everything it should, with a fix."""
    kinds = (VALUE, TYPE) if kind == "either" else kind
    with pytest.raises(kinds) as caught:
        call()
    error, message = caught.value, str(caught.value)
    assert isinstance(error, errors.GroupNormError)
    assert isinstance(error, ValueError if isinstance(error, VALUE) else TypeError)
    for fragment in fragments:
        assert fragment in message or re.search(fragment, message), (
            f"{fragment!r} not in {message!r}"
        )
    # After the value come the rule and the fix.
    assert re.search(r"[.:;,] ", message), message
    return message


@pytest.mark.parametrize("function", [group_norm, group_norm_vjp])
@pytest.mark.parametrize("case", GROUPS + COMMON + AXES + MASKS + PARAMETERS, ids=identify)
def test_functions(case, function):
    keywords, kind, *fragments = case
    assert_raises(lambda: function(X, **{"num_groups": 3, **keywords}), kind, *fragments)


LAYER_AXES = [
    ({"feature_axis": 3}, VALUE, "feature_axis=3", "(4, 5, 6)"),
    ({"feature_axis": -4}, VALUE, "feature_axis=-4", "(4, 5, 6)"),
    ({"feature_axis": (2, -1)}, VALUE, "feature_axis=(2, -1)"),
    ({"feature_axis": 1.0}, TYPE, "feature_axis=1.0"),
    ({"in_size": ()}, VALUE, "in_size=()"),
    ({"in_size": 0}, VALUE, "in_size=0"),
    ({"in_size": (4, -6)}, VALUE, "in_size=(4, -6)"),
    ({"in_size": (4, 6.0)}, TYPE, "in_size", "6.0"),
    ({"in_size": 6.0}, TYPE, "in_size=6.0"),
    ({"in_size": True}, TYPE, "in_size=True"),
    ({"in_size": "six"}, TYPE, "in_size='six'"),
    ({"in_size": None}, TYPE, "in_size=None"),
    ({"in_size": (..., 4, ..., 6)}, VALUE, "in_size="),
    ({"in_size": (6, ...)}, VALUE, "feature_axis=-1", "in_size=(6, Ellipsis)"),
    ({"reduction_axes": (-1, "x")}, TYPE, "reduction_axes", "'x'"),
    ({"use_bias": "no"}, TYPE, "use_bias='no'"),
    ({"use_scale": 1}, TYPE, "use_scale=1"),
    ({"param_dtype": "int32"}, TYPE, "param_dtype='int32'"),
    ({"bias_init": None}, TYPE, "bias_init=None"),
    ({"bias_init": True}, TYPE, "bias_init=True"),
    ({"scale_init": "ones"}, TYPE, "scale_init='ones'"),
    ({"scale_init": [1.0] * 6}, TYPE, "scale_init="),
    ({"scale_init": np.ones(5)}, VALUE, "scale_init", "(5,)", "(6,)"),
    ({"trainable": 1}, TYPE, "trainable=1"),
    ({"key": 0}, TYPE, "key=0"),
    ({"rngs": 0}, TYPE, "rngs=0"),
    ({"bias_init": lambda shape: np.zeros(5)}, VALUE, "bias_init", "(5,)", "(6,)"),
    ({"scale_init": lambda: 1.0}, TYPE, "scale_init", "takes no argument"),
    ({"param_type": int}, TYPE, "param_type=<class 'int'>"),
    ({"param_type": lambda value: "a"}, TYPE, "param_type", "it returned 'a'"),
    ({"eps": 1e-5}, TYPE, "eps=1e-05", "epsilon=1e-05"),
    ({"affine": False}, TYPE, "affine=False", "use_scale=False, use_bias=False"),
    ({"num_channels": 8}, TYPE, "num_channels=8", r"in_size=\(8, ...\)"),
    ({"backend": "tensorflow"}, VALUE, "backend='tensorflow'", "numpy"),
    ({"backend": "NumPy"}, VALUE, "backend='NumPy'", "numpy"),
    ({"backend": None}, TYPE, "backend=None"),
]


@pytest.mark.parametrize("value", ["a", None, [1.0], object], ids=repr)
def test_a_constant_that_is_not_a_number(value):
    assert_raises(lambda: initializers.constant(value), TYPE, re.escape(repr(value)))


@pytest.mark.parametrize("case", GROUPS + COMMON + LAYER_AXES, ids=identify)
def test_layer(case):
    """Wrong arguments raise when the layer is created, not when it is first called."""
    keywords, kind, *fragments = case
    keywords = {"in_size": (4, 5, 6), "num_groups": 3, **keywords}
    assert_raises(lambda: GroupNorm(**keywords), kind, *fragments)


@pytest.mark.parametrize("groups", [2.0, -3, 0, True, "3", 4, np.float64(3), None], ids=repr)
@pytest.mark.parametrize("name", ["numpy", pytest.param("torch", marks=pytest.mark.needs("torch"))])
def test_wrong_numbers_of_groups(name, groups):
    """torch: 2.0 and -3 construct. tinygrad: 4 groups of 6 channels are accepted."""
    with pytest.raises((VALUE, TYPE), match="num_groups"):
        GroupNorm(6, num_groups=groups, backend=name)


class TestInput:
    """Invalid inputs `x`."""

    CASES = {
        "list": ([[1.0, 2.0]], TYPE, "list"),
        "float": (1.5, TYPE, "float"),
        "none": (None, TYPE, "NoneType"),
        "masked array": (np.ma.masked_array(X, X > 3), TYPE, "mask="),
        "objects": (X.astype(object), TYPE, "object"),
        "strings": (X.astype(str), TYPE, "<U"),
        "dates": (X.astype("datetime64[s]"), TYPE, "datetime64"),
        "no axes": (np.float32([1]).reshape(()), VALUE, "()"),
        "records": (np.zeros((2, 6), dtype=[("a", "f4")]), TYPE, "x"),
    }

    @pytest.mark.parametrize("function", [group_norm, group_norm_vjp])
    @pytest.mark.parametrize("case", CASES)
    def test_invalid_input_raises(self, case, function):
        x, kind, fragment = self.CASES[case]
        assert_raises(lambda: function(x, num_groups=1), kind, r"\bx\b", fragment)

    def test_matrix(self):
        # Creating one warns; the test is about the error.
        with pytest.warns(PendingDeprecationWarning):
            x = np.matrix([[1.0, 2.0]])
        assert_raises(lambda: group_norm(x, num_groups=1), TYPE, "matrix")

    def test_too_few_axes_for_the_feature_axis(self):
        layer = GroupNorm((6, 5, 4), 0, num_groups=3)
        assert_raises(lambda: layer(X[0, 0]), VALUE, "feature_axis", "(5, 6)")

    def test_another_number_of_channels(self):
        layer = GroupNorm((6,), num_groups=3)
        message = assert_raises(lambda: layer(X[..., :3]), VALUE, r"\(2, 4, 5, 3\)")
        assert "3" in message
        assert "6" in message


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_real_dtype_for_complex_input(dtype):
    x = X.astype(np.complex64)
    assert_raises(
        lambda: group_norm(x, num_groups=3, dtype=dtype), TYPE, f"dtype={dtype!r}", "complex"
    )


def test_dtype_input_with_a_complex_scale():
    scale = np.ones(6, np.complex64)
    assert_raises(
        lambda: group_norm(X, scale, num_groups=3, dtype="input"), TYPE, "dtype='input'", "complex"
    )


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 5, 1), (), (1, 4, 5, 6)])
def test_a_cotangent_of_another_shape(shape):
    _, pullback = group_norm_vjp(X, num_groups=3)
    assert_raises(lambda: pullback(np.ones(shape, np.float32)), VALUE, str(shape), "(2, 4, 5, 6)")


@pytest.mark.parametrize("argument", ["scale", "bias", "mask", "dy"])
def test_masked_arrays_raise_for_every_argument(argument):
    masked = np.ma.masked_array(X if argument == "dy" else np.ones(6, np.float32))

    def call(**given):
        dy = given.pop("dy", X)
        return group_norm_vjp(X, num_groups=2, **given)[1](dy)

    call(**{argument: masked.data})
    with pytest.raises(TYPE, match=f"{argument} is a numpy.ma.MaskedArray"):
        call(**{argument: masked})


def test_axis_name_needs_a_library_with_replicas():
    with pytest.raises(errors.GroupNormError, match="axis_name='batch'"):
        group_norm(X, num_groups=3, axis_name="batch")


class TestForeignArrays:
    """Arrays of two libraries, or on two devices, are never converted or copied implicitly."""

    @pytest.mark.needs("torch")
    def test_a_tensor_among_numpy_arrays(self):
        torch = importlib.import_module("torch")
        assert_raises(
            lambda: group_norm(X, torch.ones(6), num_groups=3),
            TYPE,
            "scale",
            "(?i)torch",
            "(?i)numpy",
        )

    @pytest.mark.needs("torch", "jax")
    def test_a_jax_array_among_tensors(self):
        torch, jnp = importlib.import_module("torch"), importlib.import_module("jax.numpy")
        x = torch.from_numpy(X)
        assert_raises(
            lambda: group_norm(x, None, jnp.ones(6), num_groups=3),
            TYPE,
            "bias",
            "(?i)torch",
            "(?i)jax",
        )

    @pytest.mark.needs("torch", "jax")
    def test_a_foreign_mask(self):
        torch, jnp = importlib.import_module("torch"), importlib.import_module("jax.numpy")
        call = lambda x, mask: group_norm(x, num_groups=3, mask=mask)  # noqa: E731
        assert_raises(lambda: call(X, torch.ones(6)), TYPE, "mask", "(?i)torch")
        for mask in (jnp.ones(6), jnp.ones((2, 1))):  # the latter is one that the kernels support
            assert_raises(lambda m=mask: call(torch.ones(2, 6), m), TYPE, "mask", "(?i)jax")

    @pytest.mark.needs("torch", "jax")
    @pytest.mark.parametrize("owner", ["torch", "jax"])
    def test_a_layer_of_another_library(self, owner):
        layer = GroupNorm((6,), num_groups=3, backend=owner)
        assert_raises(lambda: layer(X), TYPE, f"(?i){owner}", "(?i)numpy", "to_backend")

    @pytest.mark.needs("array_api_strict")
    def test_two_devices(self):
        here, there = ROWS["array_api_strict"], ROWS["array_api_strict:device1"]
        one = np.ones(6, np.float32)
        assert_raises(
            lambda: group_norm(here.asarray(X), there.asarray(one), num_groups=3),
            VALUE,
            "scale",
            "CPU_DEVICE",
            "device1",
        )
        assert_raises(
            lambda: group_norm(there.asarray(X), num_groups=3, mask=here.asarray(one > 0)),
            VALUE,
            "mask",
            "CPU_DEVICE",
            "device1",
        )

    @pytest.mark.needs("torch")
    def test_two_torch_devices(self):
        torch = importlib.import_module("torch")
        scale = torch.ones(6, device="meta")
        assert_raises(
            lambda: group_norm(torch.from_numpy(X), scale, num_groups=3),
            VALUE,
            "scale",
            "meta",
            "cpu",
        )


@pytest.mark.parametrize("wrong", [{"num_groups": 4}, {"feature_axis": 9}, {"epsilon": -1.0}])
def test_errors_are_the_same_on_every_library(backend, wrong):
    """Shapes and options are checked before any library call, under a trace as well."""
    keywords = {"num_groups": 3, **wrong}
    with pytest.raises(VALUE) as expected:
        group_norm(X, **keywords)
    with pytest.raises(VALUE) as caught:
        backend.compiled(lambda x: group_norm(x, **keywords))(backend.asarray(X))
    assert str(caught.value) == str(expected.value)


def test_arguments_after_bias_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        group_norm(X, None, None, 3)
