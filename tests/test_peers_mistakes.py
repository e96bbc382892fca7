"""What at least one published group norm gets wrong, as tests of this one."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from groupnorm import GroupNorm, group_norm
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from tests import oracle
from tests.rows import (
    CONTRACT,
    GRADIENT,
    assert_gradients,
    assert_result,
    differentiate,
    dtype_name,
    host_dtype,
    run,
)


def draw(rng, *shape, axis=-1):
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    return x, dy, *rng.normal(size=(2, shape[axis])).astype(np.float32)


def test_a_feature_axis_other_than_the_last(backend, rng):
    """brainstate, flax: not possible. keras, haiku: silently wrong for 0 and for negative ones."""
    x, _, scale, bias = draw(rng, 6, 4, 5, axis=0)
    for axis in (0, -3):
        result = run(backend, x, scale, bias, num_groups=3, feature_axis=axis)
        want = oracle.group_norm(x, scale, bias, num_groups=3, feature_axis=0)
        assert_result(backend, result, want, tolerance=2 * CONTRACT)


@pytest.mark.parametrize("axes", [(-1,), (1, -1), (2, -1), (0, 1, 2, -1)], ids=str)
def test_reduction_axes(backend, axes, rng):
    """nnx, brainstate: silently wrong by up to 388, or raises."""
    x, _, scale, bias = draw(rng, 2, 4, 5, 6)
    result = run(backend, x, scale, bias, num_groups=3, reduction_axes=axes)
    want = oracle.group_norm(x, scale, bias, num_groups=3, reduction_axes=axes)
    assert_result(backend, result, want, tolerance=2 * CONTRACT)


def test_one_axis(backend, rng):
    """nnx: raises."""
    x, _, scale, bias = draw(rng, 6)
    result = run(backend, x, scale, bias, num_groups=3)
    want = oracle.group_norm(x, scale, bias, num_groups=3)
    assert_result(backend, result, want, tolerance=2 * CONTRACT)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpys_integers(kind, rng):
    """nnx: np.int64 groups rejected."""
    x = rng.normal(size=(2, 5, 6))
    want = oracle.group_norm(x, num_groups=3)
    np.testing.assert_allclose(group_norm(x, num_groups=kind(3)), want, rtol=1e-12)
    np.testing.assert_allclose(
        group_norm(x, num_groups=None, group_size=kind(2), feature_axis=kind(2)), want, rtol=1e-12
    )
    layer = GroupNorm(kind(6), num_groups=kind(3))
    np.testing.assert_allclose(layer(x), want, rtol=1e-12)
    assert type(layer.num_groups) is int
    assert layer.in_size == (6,)


def test_mask_with_one_channel(backend, rng):
    """linen: a mask of shape (..., 1) raises. keras: masks are ignored."""
    x, _, scale, bias = draw(rng, 2, 4, 5, 6)
    mask = rng.random((2, 4, 5, 1)) < 0.6
    result = run(backend, x, scale, bias, num_groups=3, mask=mask)
    want = oracle.group_norm(x, scale, bias, num_groups=3, mask=mask)
    assert_result(backend, result, want, tolerance=2 * CONTRACT)


@pytest.mark.needs("jax")
def test_made_outside_the_map_its_axis_name_is_of():
    """linen: cannot be initialised."""
    layer = GroupNorm(6, num_groups=3, backend="jax", axis_name="devices")
    assert layer.axis_name == "devices"
    assert layer.scale.shape == (6,)


@pytest.mark.parametrize("nan", [False, True], ids=["", "NaN there"])
def test_gradients_with_a_fully_masked_sample(backend, nan, rng):
    """flax, brainstate: the scale's gradient is NaN for all channels; with NaN there, all dx."""
    x, dy, scale, bias = draw(rng, 3, 5, 6)
    mask = np.array([True, False, True])[:, None, None]
    if nan:
        x[1] = np.nan
    keywords = {"num_groups": 3, "mask": mask}
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    got = differentiate(backend, x, dy, scale, bias, **keywords)
    assert_gradients(got, want, rtol=GRADIENT)


def test_nan_in_the_padding_stays_there(backend, rng):
    """flax, brainstate: NaN in padding makes every dx NaN."""
    x, dy, scale, bias = draw(rng, 2, 5, 6)
    mask = np.array([[True] * 5, [True, True, False, False, False]])[..., None]
    x[1, 2:] = np.nan
    keywords = {"num_groups": 3, "mask": mask}
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    got = differentiate(backend, x, dy, scale, bias, **keywords)
    assert_gradients(got, want, rtol=GRADIENT)
    alone = oracle.group_norm(x[1:, :2], scale, bias, num_groups=3)
    np.testing.assert_allclose(got.y[1:, :2], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [1e4, 1e5])
@pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])
def test_offset(backend, axis, offset, rng):
    """All of them: 1e-3 at best; flax, torch channels_last, keras, ONNX, paddle: 1e3 or NaN."""
    shape = (2, 8, 10, 10) if axis == 1 else (2, 10, 10, 8)
    x = (rng.normal(size=shape) + offset).astype(np.float32)
    result = run(backend, x, num_groups=4, feature_axis=axis)
    assert_result(backend, result, oracle.group_norm(x, num_groups=4, feature_axis=axis))


@pytest.mark.needs("torch")
def test_torch_memory_format_changes_nothing(rng):
    """torch: errors of 1.2e3 in channels_last at an offset of 1e4."""
    torch = importlib.import_module("torch")
    x = torch.from_numpy((rng.normal(size=(2, 8, 10, 10)) + 1e4).astype(np.float32))
    want = oracle.group_norm(x.numpy(), num_groups=4, feature_axis=1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = group_norm(x.contiguous(memory_format=memory_format), num_groups=4, feature_axis=1)
        error = np.abs(y.numpy() - want) / np.maximum(1, np.abs(want))
        assert error.max() <= CONTRACT


@pytest.mark.parametrize("parameters", ["float16", "bfloat16", "float64"])
def test_mixed_dtypes(backend, parameters, rng, request):
    """torch: raises in eager mode, accepted when compiled."""
    if parameters == "bfloat16":
        request.getfixturevalue("needs_bfloat16")
    if parameters not in backend.dtypes:
        pytest.skip(f"{backend.library} has no {parameters}")
    x, _, scale, bias = draw(rng, 2, 5, 6)
    scale, bias = (a.astype(host_dtype(parameters)) for a in (scale, bias))
    with backend.precision(parameters):
        result = run(backend, x, scale, bias, num_groups=3)
        dtype = "float64" if parameters == "float64" else "float32"
        want = oracle.group_norm(x, scale, bias, num_groups=3)
        assert_result(backend, result, want, dtype=dtype, tolerance=2 * CONTRACT)


def test_zero_spatial_size(backend):
    """torch: weight.grad is NaN."""
    x, dy = np.zeros((2, 2, 0, 6), np.float32)
    got = differentiate(backend, x, dy, *np.ones((2, 6), np.float32), num_groups=3)
    np.testing.assert_array_equal(got.scale, np.zeros(6))
    np.testing.assert_array_equal(got.bias, np.zeros(6))
    assert got.x.shape == x.shape


@pytest.mark.parametrize("groups", [2.0, -3, 0, True, "3", 4, np.float64(3), None], ids=repr)
@pytest.mark.parametrize("name", ["numpy", pytest.param("torch", marks=pytest.mark.needs("torch"))])
def test_wrong_numbers_of_groups(name, groups):
    """torch: 2.0 and -3 construct. tinygrad: 4 groups of 6 channels are accepted."""
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match="num_groups"):
        GroupNorm(6, num_groups=groups, backend=name)


def test_one_sample_of_one_position(backend, rng):
    """torch: (1, C) raises, even in eval mode, when a group has one element."""
    x, _, scale, bias = draw(rng, 1, 6)
    result = run(backend, x, scale, bias, num_groups=6)
    np.testing.assert_array_equal(result.values, bias[None])
    result = run(backend, x, scale, bias, num_groups=3)
    want = oracle.group_norm(x, scale, bias, num_groups=3)
    assert_result(backend, result, want, tolerance=2 * CONTRACT)


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_integer_input(backend, dtype, rng):
    """equinox: a truncated integer comes out."""
    x = rng.integers(0, 100, size=(2, 5, 6)).astype(dtype)
    result = run(backend, x, num_groups=3)
    want = oracle.group_norm(x, num_groups=3)
    assert_result(backend, result, want, dtype=backend.default_float)


def test_float16_with_a_variance_beyond_float16(backend, rng):
    """haiku: statistics in the input's dtype give zeros."""
    if "float16" not in backend.dtypes:
        pytest.skip(f"{backend.library} has no float16")
    x = (1e3 * rng.normal(size=(2, 5, 6))).astype(np.float16)
    result = run(backend, x, num_groups=3)
    assert result.values.dtype == np.float16
    want = oracle.group_norm(x, num_groups=3)
    error = np.abs(result.values.astype(np.float64) - want)
    # The result rounded to float16, and one unit in the last place more.
    assert (error <= 1.5 * np.spacing(np.abs(want).astype(np.float16)).astype(np.float64)).all()


def test_groups_are_neighbouring_channels(backend):
    """MLX: interleaved (channel modulo groups) unless told otherwise."""
    x = np.array([[0, 2, 10, 20, 100, 300]], np.float32)
    result = run(backend, x, num_groups=3, epsilon=0.0)
    np.testing.assert_allclose(result.values, [[-1, 1, -1, 1, -1, 1]], rtol=1e-6)


def test_bfloat16_stays_when_asked(backend, rng, needs_bfloat16):
    """brainstate: bfloat16 in, float32 out, whatever dtype says."""
    if "bfloat16" not in backend.dtypes:
        pytest.skip(f"{backend.library} has no bfloat16")
    x, _, scale, bias = draw(rng, 2, 5, 6)
    x = x.astype(host_dtype("bfloat16"))
    result = run(backend, x, scale, bias, num_groups=3, dtype="input")
    assert dtype_name(result.array.dtype) == "bfloat16"
    want = oracle.group_norm(x, scale, bias, num_groups=3)
    error = np.abs(result.values.astype(np.float64) - want)
    assert (error <= 1.5 * 2.0**-7 * np.maximum(np.abs(want), 1e-2)).all()


def test_float64_is_computed_in_float64(backend, rng):
    """paddle on CPU: float32 only."""
    with backend.precision("float64"):
        x = rng.normal(size=(2, 5, 6)) + 1e4
        result = run(backend, x, num_groups=3)
        want = oracle.group_norm(x, num_groups=3)
        assert_result(backend, result, want, dtype="float64", tolerance=1e-11)
