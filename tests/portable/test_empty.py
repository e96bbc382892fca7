"""Empty arrays: empty results, zero gradients, no NaN and (as warnings are errors) no warning."""

import numpy as np
import pytest

import groupnorm
from groupnorm.testing import oracle
from tests.rows import CONTRACT, assert_result, check_array, default_float, differentiate, run

# (shape, feature axis): no samples, no positions, neither, no positions along one of two axes.
EMPTY = {
    "no batch": ((0, 5, 6), -1),
    "no position": ((3, 0, 6), -1),
    "neither": ((0, 0, 6), -1),
    "no row": ((2, 0, 4, 6), -1),
    "no column": ((2, 6, 4, 0), 1),
    "no batch, channels first": ((0, 6, 4), 1),
}


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("case", EMPTY)
def test_the_result_is_empty(backend, case, masked, fast):
    shape, axis = EMPTY[case]
    x = np.zeros(shape, dtype=np.float32)
    mask = np.ones(shape, dtype=bool) if masked else None
    scale, bias = np.ones((2, 6), dtype=np.float32)
    result = run(
        backend,
        x,
        scale,
        bias,
        num_groups=3,
        feature_axis=axis,
        mask=mask,
        use_fast_variance=fast,
    )
    assert_result(backend, result, np.zeros(shape))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("case", EMPTY)
def test_gradients_are_zero(backend, case, masked):
    """torch: weight.grad is NaN if there are no positions."""
    check_zero(backend, "vjp", case, masked)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("case", EMPTY)
def test_gradients_by_autodiff_are_zero(autodiff_backend, case, masked):
    check_zero(autodiff_backend, "autodiff", case, masked)


def check_zero(backend, how, case, masked):
    shape, axis = EMPTY[case]
    x, dy = np.zeros((2, *shape), dtype=np.float32)
    scale, bias = np.ones((2, 6), dtype=np.float32)
    mask = np.ones(shape, dtype=bool) if masked else None
    got = differentiate(
        backend, x, dy, scale, bias, how=how, num_groups=3, feature_axis=axis, mask=mask
    )
    assert got.x.shape == shape
    np.testing.assert_array_equal(got.scale, np.zeros(6))
    np.testing.assert_array_equal(got.bias, np.zeros(6))


@pytest.mark.parametrize("reduction_axes", [(-1,), (0, -1), (1, -1), (0, 1, 2)])
@pytest.mark.parametrize("shape", [(0, 5, 6), (3, 0, 6)])
def test_reduction_axes_of_an_empty_array(backend, shape, reduction_axes):
    """Some of these have groups without elements, some have no groups at all."""
    x = np.zeros(shape, dtype=np.float32)
    result = run(backend, x, num_groups=3, reduction_axes=reduction_axes)
    assert_result(backend, result, np.zeros(shape))


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_the_dtype_of_an_empty_result(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.library} has no {dtype}")
    result = run(backend, np.zeros((0, 5, 6), dtype=dtype), num_groups=3)
    expected = default_float(backend) if dtype == "int32" else dtype
    check_array(backend, result.array, shape=(0, 5, 6), dtype=expected)


def test_a_layer_accepts_an_empty_batch():
    y = groupnorm.GroupNorm((6,), num_groups=3)(np.zeros((0, 5, 6), dtype=np.float32))
    assert y.shape == (0, 5, 6)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
def test_groups_of_one_element_give_the_bias(backend, fast, rng):
    """Not empty, but without spread: the variance of a single value is 0."""
    x = (1e4 * rng.normal(size=(5, 6))).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    result = run(backend, x, None, bias, num_groups=6, use_fast_variance=fast)
    reference = oracle.group_norm(x, None, bias, num_groups=6)
    assert_result(backend, result, reference, tolerance=0)


def test_one_sample_of_one_position(backend, rng):
    """torch: (1, C) raises, even in eval mode, if a group has one element."""
    x = rng.normal(size=(1, 6)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 6)).astype(np.float32)
    result = run(backend, x, scale, bias, num_groups=6)
    np.testing.assert_array_equal(result.values, bias[None])
    result = run(backend, x, scale, bias, num_groups=3)
    want = oracle.group_norm(x, scale, bias, num_groups=3)
    assert_result(backend, result, want, tolerance=2 * CONTRACT)
