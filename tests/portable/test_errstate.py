"""`numpy.errstate(all="raise")` raises for the values of a result, not for how it is computed."""

from __future__ import annotations

import numpy as np
import pytest

from groupnorm import (
    GroupNorm,
    group_norm,
    group_norm_vjp,
    group_statistics,
    merge_statistics,
    normalize,
)
from groupnorm.testing import oracle
from tests.core_calls import CALLS, check, draw, reference
from tests.rows import CONTRACT, assert_close

# Squares of the first are 0 in float32, and sums of squares of the last are infinite.
SIZES = (1e-22, 1e-15, 1.0, 1e18)


@pytest.fixture(params=[None, "portable"], ids=["default", "portable"])
def implementation(request):
    return request.param


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients(call, masked, size, implementation, rng, needs_bfloat16):
    if call == "bfloat16" and masked:
        implementation = "portable"  # no other test compiles a kernel for it
    x, dy, scale, bias, keywords = draw(rng, call, masked, size)
    with np.errstate(all="raise"):
        y, pullback = group_norm_vjp(x, scale, bias, implementation=implementation, **keywords)
        gradients = pullback(dy)
        alone = group_norm(x, scale, bias, implementation=implementation, **keywords)
    np.testing.assert_array_equal(alone, y)
    check((y, gradients), reference(x, dy, scale, bias, keywords), x.dtype.name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_statistics(masked, size, rng):
    x, _, _, _, keywords = draw(rng, "last", masked, size)
    epsilon = keywords.pop("epsilon")
    with np.errstate(all="raise"):
        keywords["mask"] = mask = keywords.get("mask", np.ones(x.shape, bool))
        halves = [
            group_statistics(x[:, half], num_groups=2, mask=mask[:, half])
            for half in (slice(2), slice(2, None))
        ]
        y = normalize(x, merge_statistics(*halves), epsilon=epsilon, **keywords)
    want = oracle.group_norm(x, epsilon=epsilon, **keywords)
    assert_close(y, want, tolerance=CONTRACT)


def test_a_layer(rng, implementation):
    layer = GroupNorm(8, num_groups=2, activation="gelu", implementation=implementation)
    x = 1e3 * rng.normal(size=(2, 5, 8)).astype(np.float32)
    with np.errstate(all="raise"):
        y, pullback = layer.vjp(x)
        pullback(y)
        np.testing.assert_array_equal(layer(x), y)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_parameters_and_cotangents_of_other_dtypes(dtype, implementation, rng):
    """Gradients, results and cotangents that vanish in a narrower dtype."""
    x = rng.normal(size=(2, 20, 8)).astype(np.float32)
    scale, bias = (1e-7 * rng.normal(size=(2, 8))).astype(np.float16)
    dy = 1e-9 * rng.normal(size=x.shape)
    dy[0, 0, 0] = 1e-60
    with np.errstate(all="raise"):
        y, pullback = group_norm_vjp(
            x, scale, bias, num_groups=2, dtype=dtype, implementation=implementation
        )  # fmt: skip
        gradients = pullback(dy)
    want = oracle.group_norm(x, scale, bias, num_groups=2)
    assert_close(y, want, tolerance=1e-7)
    assert gradients.scale.dtype == np.float16
    assert (abs(gradients.scale) <= 1e-7).all()


def test_saturated_padding_of_subnormal_data(rng):
    """Without an epsilon 1 / standard deviation is the largest number; scale is above 1."""
    mask = rng.random((2, 20, 8)) < 0.6
    x = np.where(mask, 1e-40 * rng.normal(size=mask.shape), np.finfo(np.float32).min)
    x, scale = x.astype(np.float32), np.full(8, 100, np.float32)
    keywords = {"num_groups": 2, "epsilon": 0.0, "mask": mask}
    with np.errstate(all="raise"):
        y = group_norm(x, scale, implementation="portable", **keywords)
    want = oracle.group_norm(x, scale, **keywords)
    assert_close(np.where(mask, y, 0), np.where(mask, want, 0), tolerance=CONTRACT)
    assert np.isfinite(y).all()


def test_what_overflows_in_the_result_is_reported(rng):
    x = rng.normal(size=(2, 20, 8)).astype(np.float16)
    scale = np.full(8, 6e4, np.float16)
    for dtype in ("float16", None):
        with np.errstate(all="raise"), pytest.raises(FloatingPointError, match="overflow"):
            group_norm(x, scale, num_groups=2, dtype=dtype, implementation="portable")
        with pytest.warns(RuntimeWarning, match="overflow"):
            group_norm(x, scale, num_groups=2, dtype=dtype, implementation="portable")


def test_infinite_elements_are_reported(rng):
    x = rng.normal(size=(2, 20, 8))
    x[0, 3, 2] = np.inf
    with np.errstate(all="raise"), pytest.raises(FloatingPointError, match="invalid"):
        group_norm(x, num_groups=2)
