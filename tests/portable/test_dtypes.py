"""Dtypes of the input, the parameters and the result."""

import importlib

import numpy as np
import pytest

import groupnorm
from groupnorm.testing import oracle
from tests.rows import (
    CONTRACT,
    CONTRACT_64,
    GRADIENT,
    ROWS,
    assert_close,
    assert_gradient,
    assert_gradients,
    assert_result,
    call_with_arrays,
    check_array,
    default_float,
    differentiate,
    dtype_name,
    host_dtype,
    run,
)

SHAPE = (3, 20, 12)
LOW = ["float16", "bfloat16"]
INTEGERS = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
TOLERANCE = {
    "float32": CONTRACT,
    "complex64": CONTRACT,
    "float64": CONTRACT_64,
    "complex128": CONTRACT_64,
}
# Number of fraction bits, and the exponent of the smallest subnormal.
STEPS = {"float16": (10, -24), "bfloat16": (7, -133)}


def skip_unless(backend, *dtypes):
    missing = set(dtypes) - backend.dtypes
    if missing:
        pytest.skip(f"{backend.library} has no {', '.join(sorted(missing))}")


def draw(rng, dtype, shape=SHAPE):
    values = 3 * rng.normal(size=shape)
    if dtype.startswith("complex"):
        values = values + 1j * rng.normal(size=shape)
    return values.astype(host_dtype(dtype))


def assert_rounded(actual, reference, dtype):
    """Assert that `actual` is the reference rounded to `dtype`, to within one additional ulp."""
    digits, smallest = STEPS[dtype]
    _, exponent = np.frexp(np.abs(reference))
    unit = np.ldexp(1.0, np.maximum(exponent - 1 - digits, smallest))
    error = np.abs(actual.astype(np.float64) - reference)
    # Statistics are float32: near zero their error exceeds the ulp of the output.
    worst = (error - 1e-6) / unit
    assert np.isfinite(error).all()
    assert worst.max() <= 1.5, f"{worst.max():.3g} units in the last place"


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_inexact_dtypes_are_kept(wide_backend, dtype, fast, rng):
    skip_unless(wide_backend, dtype)
    x, scale, bias = draw(rng, dtype), *draw(rng, dtype, (2, 12))
    with wide_backend.precision(dtype):
        result = run(wide_backend, x, scale, bias, num_groups=3, use_fast_variance=fast)
        reference = oracle.group_norm(x, scale, bias, num_groups=3)
        # The bound applies to normalized values; the scale here is up to 10.
        assert_result(wide_backend, result, reference, dtype=dtype, tolerance=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("feature_axis", [-1, 1])
@pytest.mark.parametrize("factor", [1.0, 1e3], ids=["small", "large"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.usefixtures("needs_bfloat16")
def test_16_bit_results_are_correctly_rounded(backend, dtype, factor, feature_axis, fast, rng):
    """Large values too: their variance, 1e6, exceeds float16's range."""
    skip_unless(backend, dtype)
    x = (factor * rng.normal(size=(3, 12, 16, 24))).astype(host_dtype(dtype))
    keywords = {"num_groups": 3, "feature_axis": feature_axis}
    result = run(backend, x, use_fast_variance=fast, **keywords)
    check_array(backend, result.array, shape=x.shape, dtype=dtype)
    assert_rounded(result.values, oracle.group_norm(x, **keywords), dtype)


def test_a_variance_that_overflows_float16(backend, rng):
    """haiku: statistics in the input's dtype give zeros."""
    skip_unless(backend, "float16")
    x = (1e3 * rng.normal(size=(2, 5, 6))).astype(np.float16)
    result = run(backend, x, num_groups=3)
    assert result.values.dtype == np.float16
    want = oracle.group_norm(x, num_groups=3)
    error = np.abs(result.values.astype(np.float64) - want)
    # The result rounded to float16, and one additional ulp.
    assert (error <= 1.5 * np.spacing(np.abs(want).astype(np.float16)).astype(np.float64)).all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.usefixtures("needs_bfloat16")
def test_16_bit_inputs_with_an_offset(backend, dtype, rng):
    """Only rounding the input loses accuracy; the reference is that of the rounded input."""
    skip_unless(backend, dtype)
    x = (100 + rng.normal(size=(2, 500, 12))).astype(host_dtype(dtype))
    result = run(backend, x, num_groups=3)
    assert_rounded(result.values, oracle.group_norm(x, num_groups=3), dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.usefixtures("needs_bfloat16")
def test_long_16_bit_groups_are_summed_in_float32(backend, dtype, rng):
    """ml_dtypes would sum in bfloat16, where the sum of 4096 ones is 256."""
    skip_unless(backend, dtype)
    x = (1 + rng.random(size=(1, 1 << 14, 4))).astype(host_dtype(dtype))
    result = run(backend, x, num_groups=1)
    assert_rounded(result.values, oracle.group_norm(x, num_groups=1), dtype)


@pytest.mark.parametrize("how", ["vjp", "autodiff"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.usefixtures("needs_bfloat16")
def test_16_bit_gradients(autodiff_backend, dtype, masked, how, rng):
    skip_unless(autodiff_backend, dtype)
    x, dy = (draw(rng, dtype) for _ in range(2))
    scale, bias = draw(rng, dtype, (2, 12))
    keywords = {"num_groups": 3, "mask": rng.random((3, 20, 1)) < 0.7 if masked else None}
    got = differentiate(autodiff_backend, x, dy, scale, bias, how=how, **keywords)
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    assert_gradients(got, want, rtol=2.0 ** -STEPS[dtype][0])


@pytest.mark.parametrize("dtype", ["float64", "complex64", "complex128"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_by_vjp(backend, dtype, masked, rng):
    check_gradients(backend, "vjp", dtype, masked, rng)


@pytest.mark.parametrize("dtype", ["float64", "complex64", "complex128"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_by_autodiff(autodiff_backend, dtype, masked, rng):
    """Complex gradients follow torch's convention, dL/dRe + i dL/dIm, however they are computed."""
    check_gradients(autodiff_backend, "autodiff", dtype, masked, rng)


def check_gradients(backend, how, dtype, masked, rng):
    skip_unless(backend, dtype)
    x, dy = (draw(rng, dtype) for _ in range(2))
    scale, bias = draw(rng, dtype, (2, 12))
    keywords = {"num_groups": 3, "mask": rng.random((3, 20, 1)) < 0.7 if masked else None}
    with backend.precision(dtype):
        got = differentiate(backend, x, dy, scale, bias, how=how, **keywords)
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    assert_gradients(got, want, rtol=1e-5 if dtype == "complex64" else 1e-14)


@pytest.mark.parametrize("dtype", [*INTEGERS, "bool"])
def test_integers_give_the_default_float(wide_backend, dtype, rng):
    """equinox: the result is a truncated integer."""
    skip_unless(wide_backend, dtype)
    x = rng.integers(0, 2 if dtype == "bool" else 100, size=SHAPE).astype(dtype)
    with wide_backend.precision(dtype):
        wide = dtype in ("int64", "uint64") and wide_backend.library == "jax"
        expected = "float64" if wide else default_float(wide_backend)
        result = run(wide_backend, x, num_groups=3)
        reference = oracle.group_norm(x, num_groups=3)
        assert_result(wide_backend, result, reference, dtype=expected, tolerance=CONTRACT)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_gradients_of_integer_input(backend, dtype, rng):
    """They have the result's dtype: an integer dtype cannot hold them."""
    x = rng.integers(0, 2 if dtype == "bool" else 100, size=SHAPE).astype(dtype)
    dy, scale = draw(rng, "float32"), draw(rng, "float32", (12,))

    def gradients(x, dy, scale):
        y, pullback = groupnorm.group_norm_vjp(x, scale, num_groups=3)
        return y, *pullback(dy)[:2]

    out, _ = call_with_arrays(backend, gradients, x=x, dy=dy, scale=scale)
    y, dx, dscale = (backend.to_numpy(a) for a in out)
    assert dx.dtype == y.dtype == np.dtype(default_float(backend))
    assert_close(y, oracle.group_norm(x, scale, num_groups=3), tolerance=4 * CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, num_groups=3)
    assert_gradient(dx, want.x, rtol=GRADIENT)
    assert_gradient(dscale, want.scale, rtol=GRADIENT)


def test_gradients_of_integer_parameters_are_not_rounded(quick_backend, rng):
    x = rng.normal(size=(1, 20, 4)).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    scale = np.ones(4, int)
    _, pullback = groupnorm.group_norm_vjp(quick_backend.asarray(x), scale, num_groups=2)
    got = quick_backend.to_numpy(pullback(quick_backend.asarray(dy)).scale)
    want = oracle.group_norm_gradients(x, dy, scale.astype(float), num_groups=2).scale
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# input, scale, bias -> result, for combinations where it does not depend on the library
MIXED = [
    ("float16", "float32", "float32", "float32"),
    ("bfloat16", "float32", "float32", "float32"),
    ("bfloat16", "float16", None, "float32"),
    ("float32", "float16", "bfloat16", "float32"),
    ("float32", "float64", None, "float64"),
    ("float64", "float32", "float16", "float64"),
    ("float32", None, "complex64", "complex64"),
    ("complex64", "float32", "float32", "complex64"),
    ("complex64", "float64", None, "complex128"),
    ("float64", "complex64", None, "complex128"),
]


@pytest.mark.parametrize(("x", "scale", "bias", "expected"), MIXED)
@pytest.mark.usefixtures("needs_bfloat16")
def test_mixed_parameter_dtypes(backend, x, scale, bias, expected, rng):
    names = {name for name in (x, scale, bias) if name}
    skip_unless(backend, *names, expected)
    data = draw(rng, x)
    weights = draw(rng, scale, (12,)) if scale else None
    offsets = draw(rng, bias, (12,)) if bias else None
    with backend.precision(*names):
        result = run(backend, data, weights, offsets, num_groups=3)
        reference = oracle.group_norm(data, weights, offsets, num_groups=3)
        tolerance = 4 * CONTRACT
        assert_result(backend, result, reference, dtype=expected, tolerance=tolerance)


@pytest.mark.parametrize("parameters", ["float16", "bfloat16", "float64"])
def test_parameters_of_another_dtype(backend, parameters, rng, request):
    """torch: raises in eager mode, accepted when compiled."""
    if parameters == "bfloat16":
        request.getfixturevalue("needs_bfloat16")
    skip_unless(backend, parameters)
    x = rng.normal(size=(2, 5, 6)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 6)).astype(host_dtype(parameters))
    with backend.precision(parameters):
        result = run(backend, x, scale, bias, num_groups=3)
        dtype = "float64" if parameters == "float64" else "float32"
        want = oracle.group_norm(x, scale, bias, num_groups=3)
        assert_result(backend, result, want, dtype=dtype, tolerance=2 * CONTRACT)


@pytest.mark.needs("jax")
def test_a_float64_constant_works_with_jax(rng):
    jnp = importlib.import_module("jax.numpy")
    x = rng.normal(size=(2, 9, 8)).astype(np.float32)
    y = groupnorm.group_norm(jnp.asarray(x), np.full(8, 2.0), num_groups=2)
    assert y.dtype == jnp.result_type(float)
    np.testing.assert_allclose(y, oracle.group_norm(x, np.full(8, 2.0), num_groups=2), atol=5e-6)


@pytest.mark.parametrize("x", ["uint8", "int64", "bool"])
def test_integer_input_with_parameters(backend, x, rng):
    """The default float, then promoted with the parameters."""
    skip_unless(backend, x, "float32")
    data = rng.integers(0, 2, size=SHAPE).astype(x)
    scale = draw(rng, "float32", (12,))
    with backend.precision(x):
        result = run(backend, data, scale, num_groups=3)
        wide = x == "int64" and backend.library == "jax"
        expected = "float64" if wide else default_float(backend)
        reference = oracle.group_norm(data, scale, num_groups=3)
        assert_result(backend, result, reference, dtype=expected, tolerance=4 * CONTRACT)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
)
@pytest.mark.usefixtures("needs_bfloat16")
def test_dtype_sets_the_dtype_of_the_result(backend, dtype, rng):
    skip_unless(backend, dtype)
    x, scale = draw(rng, "float32"), draw(rng, "float32", (12,))
    reference = oracle.group_norm(x, scale, num_groups=3)
    with backend.precision(dtype):
        own = backend.asarray(np.zeros(0, host_dtype(dtype))).dtype
        for given in (dtype, own, host_dtype(dtype)):
            result = run(backend, x, scale, num_groups=3, dtype=given)
            check_array(backend, result.array, shape=x.shape, dtype=dtype)
            if dtype in STEPS:
                assert_rounded(result.values, reference, dtype)
            else:
                assert_close(result.values, reference, tolerance=4 * CONTRACT)


@pytest.mark.needs("torch", "jax")
@pytest.mark.parametrize("row", [ROWS["numpy"], ROWS["torch"], ROWS["jax"]], ids=str)
def test_dtype_of_another_framework(row, rng):
    x = draw(rng, "float32")
    for owner in ("torch", "jax.numpy", "ml_dtypes"):
        given = importlib.import_module(owner).bfloat16
        result = run(row, x, num_groups=3, dtype=given)
        check_array(row, result.array, shape=x.shape, dtype="bfloat16")


@pytest.mark.parametrize("x", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.usefixtures("needs_bfloat16")
def test_dtype_input_keeps_the_input_dtype(backend, x, rng):
    skip_unless(backend, x)
    data, scale = draw(rng, x), draw(rng, "float32", (12,))
    result = run(backend, data, scale, num_groups=3, dtype="input")
    check_array(backend, result.array, shape=SHAPE, dtype=x)
    reference = oracle.group_norm(data, scale, num_groups=3)
    if x in STEPS:
        assert_rounded(result.values, reference, x)
    else:
        assert_close(result.values, reference, tolerance=4 * CONTRACT)


@pytest.mark.usefixtures("needs_bfloat16")
def test_dtype_input_keeps_bfloat16(backend, rng):
    """brainstate: bfloat16 in, float32 out, whatever dtype is passed."""
    skip_unless(backend, "bfloat16")
    x = rng.normal(size=(2, 5, 6)).astype(host_dtype("bfloat16"))
    scale, bias = rng.normal(size=(2, 6)).astype(np.float32)
    result = run(backend, x, scale, bias, num_groups=3, dtype="input")
    assert dtype_name(result.array) == "bfloat16"
    want = oracle.group_norm(x, scale, bias, num_groups=3)
    error = np.abs(result.values.astype(np.float64) - want)
    assert (error <= 1.5 * 2.0**-7 * np.maximum(np.abs(want), 1e-2)).all()


def test_dtype_input_with_integers_gives_the_default_float(backend, rng):
    x = rng.integers(0, 9, size=SHAPE).astype(np.int32)
    result = run(backend, x, num_groups=3, dtype="input")
    assert dtype_name(result.array) == default_float(backend)
    assert_close(result.values, oracle.group_norm(x, num_groups=3), tolerance=CONTRACT)


@pytest.mark.parametrize("how", ["vjp", "autodiff"])
@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "float32"), ("float32", "float16"), ("float16", "bfloat16")]
)
def test_gradients_have_the_dtypes_of_their_arguments(autodiff_backend, how, dtypes, rng):
    """`differentiate` asserts the dtypes of the gradients; here input and parameters differ."""
    x, scale, bias = draw(rng, dtypes[0]), *draw(rng, dtypes[1], (2, 12))
    dy = draw(rng, "float32")
    got = differentiate(autodiff_backend, x, dy, scale, bias, how=how, num_groups=3)
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=3)
    assert_gradients(got, want, rtol=2.0**-7)


@pytest.mark.parametrize("param_dtype", ["float16", "float64", "complex64"])
def test_param_dtype_of_the_layer(param_dtype, rng):
    layer = groupnorm.GroupNorm((12,), num_groups=3, param_dtype=param_dtype)
    assert layer.scale.dtype == layer.bias.dtype == np.dtype(param_dtype)
    y = layer(draw(rng, "float32"))
    assert y.dtype == np.result_type("float32", param_dtype)


def test_parameters_are_float32_by_default():
    layer = groupnorm.GroupNorm((12,), num_groups=3)
    assert layer.scale.dtype == layer.bias.dtype == np.float32


def test_big_endian_input_is_read_correctly(rng):
    x = draw(rng, "float32")
    y = groupnorm.group_norm(x.astype(">f4"), num_groups=3)
    assert y.dtype.newbyteorder("=") == np.float32
    assert_close(y.astype(np.float32), oracle.group_norm(x, num_groups=3), tolerance=CONTRACT)
