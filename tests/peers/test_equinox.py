"""The cases of equinox's tests of `eqx.nn.GroupNorm`, and of its layer norm.

equinox's layers take one sample, (channels, ...); ours take a batch, here of one or three samples.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupnorm import GroupNorm, group_norm
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import oracle
from tests.peers.compare import (
    HALF,
    Case,
    Difference,
    assert_all_agree,
    assert_differs,
    assert_listed,
    assert_same_error,
    draw,
    jitted,
    quick_jit,
)
from tests.rows import CONTRACT

DIFFERENT_ON_PURPOSE = {
    "large_mean": Difference(
        "mean 1e5 times the spread",
        "errors above 1e-3: the mean is rounded to float32",
        "errors below 5e-6",
        1e-3,
    ),
    "constant_group": Difference(
        "a constant group",
        "rounding errors divided by sqrt(epsilon), up to 1",
        "the bias, exactly",
        0.1,
    ),
    "huge_values": Difference("values of 1e20", "0: their squares overflow", "normalized", 0.9),
    "integers": Difference(
        "integer input", "the result is truncated to integers", "a float result", 0.5
    ),
    "negative_groups": Difference("`groups=-3`", "accepts it", "raises", "accepts"),
    "float_for_an_integer": Difference("`groups=3.0`", "accepts it", "raises", "accepts"),
}

FIRST = {"feature_axis": 1, "epsilon": 1e-5}


def with_parameters(peer, scale, bias):
    values = (jnp.asarray(scale), jnp.asarray(bias))
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), peer, values)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(128,), (128, 4, 5), (128, 7)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(dtype, shape, affine, rng):
    """equinox keeps x's dtype; ours does so with parameters of that dtype, or dtype="input"."""
    x = jnp.asarray(rng.uniform(size=(3, *shape)), dtype)
    peer = eqx.nn.GroupNorm(4, 128, channelwise_affine=affine, dtype=jnp.dtype(dtype))
    scale, bias = jnp.asarray(draw(rng, 2, 128), dtype) if affine else (None, None)
    if affine:
        assert (peer.weight.shape, peer.weight.dtype) == ((128,), dtype)
        peer = with_parameters(peer, scale, bias)
    ours = jitted(x, scale, bias, num_groups=4, **FIRST)
    wide = [None if a is None else np.asarray(a, np.float32) for a in (x, scale, bias)]
    want = oracle.group_norm(*wide, num_groups=4, **FIRST)
    tolerance = HALF.get(dtype, 2 * CONTRACT)
    theirs = jax.jit(jax.vmap(peer))(x)
    assert_all_agree(theirs, ours, want, tolerance=tolerance, peer=1e-4 + tolerance)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_ramps_of_two_slopes_and_the_formula(num_groups):
    """Two ramps differ in offset and slope alone, so that epsilon alone tells them apart."""
    ramps = np.stack([np.linspace(0.1, 1, 10), np.linspace(0, 1, 10)]).astype(np.float32)
    ours = jitted(ramps, num_groups=num_groups, **FIRST)
    want = oracle.group_norm(ramps, num_groups=num_groups, **FIRST)
    assert_all_agree(jax.jit(jax.vmap(eqx.nn.GroupNorm(num_groups, 10)))(ramps), ours, want)
    np.testing.assert_allclose(ours[0], ours[1], atol=1e-4 if num_groups == 1 else 1e-3)
    parts = ramps.astype(np.float64).reshape(2, num_groups, -1)
    deviation = parts - parts.mean(axis=2, keepdims=True)
    formula = deviation / np.sqrt(parts.var(axis=2, keepdims=True) + 1e-5)
    np.testing.assert_allclose(ours, formula.reshape(2, 10), atol=1e-5)


@pytest.mark.parametrize("shape", [(128,), (16, 8)], ids=str)
def test_layer_norm_of_all_axes_is_one_group(shape, rng):
    x = draw(rng, 3, *shape)
    features = tuple(range(1, x.ndim))
    scale, bias = draw(rng, 2, *shape)
    peer = with_parameters(eqx.nn.LayerNorm(shape), scale, bias)
    options = {"num_groups": 1, "feature_axis": features, "epsilon": 1e-5}
    ours = jitted(x, scale, bias, **options)
    assert_all_agree(jax.jit(jax.vmap(peer))(x), ours, oracle.group_norm(x, scale, bias, **options))


def test_the_number_of_channels_may_be_unknown_without_parameters(rng):
    """Ours is then a function; a layer always knows its channels, even without parameters."""
    x = draw(rng, 3, 128)
    peer = eqx.nn.GroupNorm(4, channelwise_affine=False)
    ours = jitted(x, num_groups=4, **FIRST)
    assert_all_agree(jax.jit(jax.vmap(peer))(x), ours, oracle.group_norm(x, num_groups=4, **FIRST))


def test_state_and_key_are_passed_through(rng):
    """In equinox a layer takes `key=` and may be followed by one that has a state."""
    layer, x = GroupNorm(8, num_groups=2, backend="jax"), draw(rng, 3, 8)
    network = eqx.nn.Sequential([layer, layer])
    y = quick_jit(network)(x, key=jax.random.key(0))
    np.testing.assert_allclose(y, quick_jit(lambda x: layer(layer(x)))(x), atol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [((3, 4), (4, 3)), ((4, None), (None, 4))],
    ids=["not divisible", "channels unknown"],
)
def test_errors(theirs, ours):
    channels, groups = ours
    assert_same_error(
        lambda: eqx.nn.GroupNorm(*theirs),
        lambda: GroupNorm(channels, num_groups=groups, backend="jax"),
        match="num_groups" if channels else "in_size",
    )


# Differences ---------------------------------------------------------------------------------


def values(x) -> Case:
    return Case(
        lambda: jax.jit(jax.vmap(eqx.nn.GroupNorm(3, 6)))(x),
        lambda: jitted(x, num_groups=3, **FIRST),
        oracle.group_norm(x, num_groups=3, **FIRST),
    )


def large_mean(rng):
    return values(draw(rng, 2, 6, 8, 8) + np.float32(1e5))


def constant_group(rng):
    return values(np.full((2, 6, 8, 8), 10000.1, np.float32))


def huge_values(rng):
    return values(np.float32(1e20) * draw(rng, 2, 6, 8, 8))


def integers(rng):
    return values(rng.integers(-9, 9, size=(2, 6, 8, 8)).astype(np.int32))


def negative_groups(rng):
    return Case(
        lambda: eqx.nn.GroupNorm(-3, 6).weight,
        lambda: group_norm(jnp.zeros((2, 6)), num_groups=-3),
        ArgumentValueError,
    )


def float_for_an_integer(rng):
    return Case(
        lambda: eqx.nn.GroupNorm(3.0, 6).weight,
        lambda: group_norm(jnp.zeros((2, 6)), num_groups=3.0),
        ArgumentTypeError,
    )


@pytest.mark.parametrize("name", DIFFERENT_ON_PURPOSE)
def test_different_on_purpose(name, rng):
    assert_differs(DIFFERENT_ON_PURPOSE[name], globals()[name](rng))


def test_the_page_lists_these_differences():
    assert_listed("equinox", DIFFERENT_ON_PURPOSE)
