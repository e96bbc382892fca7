"""The cases of brainstate's tests of `brainstate.nn.GroupNorm`, and the signature taken from it."""

from __future__ import annotations

import functools
import inspect

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupnorm import GroupNorm, group_norm
from groupnorm.errors import ArgumentTypeError
from groupnorm.testing import oracle
from tests.peers.compare import (
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

DIFFERENT_ON_PURPOSE = {
    "documented_example": Difference(
        "the documented example, `GroupNorm(x.shape, num_groups=1)(x)`",
        'raises: "only supports 1D feature axis"',
        "equals the layer norm over axes (1, 2, 3), as documented",
        "raises",
    ),
    "channels_first": Difference(
        "`feature_axis=0` of `in_size=(C, H, W)`", "raises", "the channels are on axis 1", "raises"
    ),
    "param_type": Difference(
        "`param_type=brainstate.ParamState`, as documented",
        "raises in the call",
        "works",
        "raises",
    ),
    "large_mean": Difference(
        "mean 1e4 times the spread",
        "errors above 100: the variance is E[x²] − E[x]²",
        "errors below 5e-6",
        100.0,
    ),
    "features_alone": Difference(
        "`reduction_axes=-1`, the features alone",
        "wrong: statistics are repeated along axis 1",
        "right for every set of axes with the features",
        1.0,
    ),
    "batch_and_features": Difference(
        "`reduction_axes=(0, -1)`", "wrong, in the same way", "right", 1.0
    ),
    "order_of_axes": Difference(
        "`reduction_axes` that do not end with the features", "raises", "any order", "raises"
    ),
    "numpy_integers": Difference(
        "`num_groups` of type `np.int64`", "raises", "any integer type", "raises"
    ),
    "bool_for_an_integer": Difference("`num_groups=True`", "accepts it as 1", "raises", "accepts"),
    "mask_of_positions": Difference(
        "a mask of shape (..., 1)",
        "raises, although it broadcasts",
        "any mask that broadcasts",
        "raises",
    ),
    "gradient_of_padding": Difference(
        "padding that is NaN, under a mask",
        "every gradient of x is NaN",
        "padding leaks nowhere",
        "NaN",
    ),
}

Peer = functools.partial(brainstate.nn.GroupNorm, use_fast_variance=False)


def layer_with(values, *arguments, **options):
    """Return a layer of ours with these parameters, scale first."""
    layer = GroupNorm(*arguments, backend="jax", **options)
    return jax.tree.unflatten(jax.tree.structure(layer), [jnp.asarray(a) for a in values])


def check(x, options, rng, **extra):
    """Compare all three with random parameters, those that `options` leave."""
    given = {
        name: draw(rng, x.shape[-1])
        for name in ("scale", "bias")
        if options.get(f"use_{name}", True)
    }
    peer = Peer((x.shape[-1],), feature_axis=0, **options)
    if given:
        assert {k: v.shape for k, v in peer.weight.value.items()} == {
            k: v.shape for k, v in given.items()
        }
        peer.weight.value = {k: jnp.asarray(v) for k, v in given.items()}
    layer = layer_with(given.values(), (x.shape[-1],), feature_axis=0, **options)
    keys = ("num_groups", "group_size", "reduction_axes")
    want = oracle.group_norm(x, **given, **{k: options[k] for k in keys if k in options}, **extra)
    theirs = jax.jit(lambda x: peer(x, **extra))(x)
    assert_all_agree(theirs, quick_jit(lambda x: layer(x, **extra))(x), want)
    return peer, layer


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("use_scale", [True, False])
def test_groups_and_parameters(num_groups, use_bias, use_scale, rng):
    options = {"num_groups": num_groups, "use_bias": use_bias, "use_scale": use_scale}
    peer, layer = check(draw(rng, 4, 16), options, rng)
    assert len(jax.tree.leaves(layer)) == use_bias + use_scale
    assert (peer.weight is None) == (not (use_bias or use_scale))


@pytest.mark.parametrize("shape", [(4, 16), (4, 8, 8, 16), (2, 3, 2, 4, 16)], ids=str)
def test_channels_are_on_the_last_axis_of_any_rank(shape, rng):
    """brainstate's two tests of channels first and last are the same case, with channels last."""
    check(draw(rng, *shape), {"num_groups": 4}, rng)


def test_group_size(rng):
    peer, layer = check(draw(rng, 4, 16), {"num_groups": None, "group_size": 4}, rng)
    assert peer.num_groups == layer.num_groups == 4
    assert peer.group_size == layer.group_size == 4


def test_reduction_axes(rng):
    check(draw(rng, 2, 4, 4, 16), {"num_groups": 4, "reduction_axes": (1, 2, -1)}, rng)


def test_a_mask_that_is_true_everywhere(rng):
    check(draw(rng, 4, 16), {"num_groups": 4}, rng, mask=np.ones((4, 16), dtype=bool))


def test_one_group_equals_layer_norm(rng):
    x = draw(rng, 8, 16)
    norm = brainstate.nn.LayerNorm((16,), reduction_axes=-1, feature_axes=-1)
    assert_all_agree(jax.jit(norm)(x), jitted(x, num_groups=1), oracle.group_norm(x, num_groups=1))


def test_the_same_call_twice_gives_the_same_bits(rng):
    layer, x = GroupNorm(16, num_groups=4, backend="jax"), draw(rng, 8, 10, 16)
    call = jax.jit(layer)
    np.testing.assert_array_equal(call(x), call(x))


def test_eager_and_compiled_calls_agree(rng):
    layer, x = GroupNorm(8, num_groups=1, backend="jax"), jnp.asarray(draw(rng, 4, 8))
    np.testing.assert_allclose(layer(x), jax.jit(layer)(x), rtol=1e-5, atol=1e-6)


def test_gradients_are_finite_and_right(rng):
    x, dy = draw(rng, 4, 8), draw(rng, 4, 8)
    layer = GroupNorm(8, num_groups=1, backend="jax")
    got = quick_jit(jax.grad(lambda x: (dy * layer(x)).sum()))(x)
    np.testing.assert_allclose(
        got, oracle.group_norm_gradients(x, dy, num_groups=1).x, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (15, {"num_groups": 4}),
        (15, {"num_groups": None, "group_size": 4}),
        (16, {"num_groups": 4, "group_size": 4}),
        (16, {"num_groups": None, "group_size": None}),
    ],
    ids=str,
)
def test_errors(channels, options):
    assert_same_error(
        lambda: Peer((channels,), feature_axis=0, **options),
        lambda: GroupNorm((channels,), feature_axis=0, backend="jax", **options),
        match="num_groups|group_size",
    )


def test_signature():
    """All its parameters by name, the positional ones in its order, with its defaults."""
    theirs, ours = (
        {
            name: p
            for name, p in inspect.signature(cls.__init__).parameters.items()
            if name != "self"
        }
        for cls in (brainstate.nn.GroupNorm, GroupNorm)
    )
    assert set(theirs) <= set(ours)
    positional = [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    for name, parameter in theirs.items():
        if not name.endswith("_init") and name not in ("param_type", "in_size"):
            assert ours[name].default == parameter.default, name
            assert ours[name].kind == parameter.kind, name


# Differences ---------------------------------------------------------------------------------


def values(x, peer_size=None, **options) -> Case:
    """Return the case of a plain call of two layers."""
    size = (x.shape[-1],) if peer_size is None else peer_size
    reference = {k: v for k, v in options.items() if k not in ("param_type", "feature_axis")}
    if "feature_axis" in options:
        reference["feature_axis"] = options["feature_axis"] + 1  # behind the batch
    return Case(
        lambda: jax.jit(brainstate.nn.GroupNorm(size, **options))(x),
        lambda: quick_jit(GroupNorm(size, backend="jax", **options))(x),
        oracle.group_norm(x, **reference),
    )


def documented_example(rng):
    """`in_size` is the whole shape, and the first axis is the batch all the same."""
    x = draw(rng, 3, 4, 5, 6)
    return values(x, x.shape, num_groups=1)


def channels_first(rng):
    return values(draw(rng, 2, 6, 4, 5), (6, 4, 5), feature_axis=0, num_groups=3)


def param_type(rng):
    return values(draw(rng, 2, 4, 6), num_groups=3, param_type=brainstate.ParamState)


def large_mean(rng):
    return values(draw(rng, 2, 8, 8, 6) + np.float32(1e4), num_groups=3)


def reduction_axes(rng, *axes):
    return values(draw(rng, 2, 4, 4, 6), num_groups=3, reduction_axes=axes)


def features_alone(rng):
    return reduction_axes(rng, -1)


def batch_and_features(rng):
    return reduction_axes(rng, 0, -1)


def order_of_axes(rng):
    return reduction_axes(rng, 3, 1, 2)


def numpy_integers(rng):
    return values(draw(rng, 2, 4, 6), num_groups=np.int64(3))


def bool_for_an_integer(rng):
    x = jnp.zeros((2, 4, 6))
    return Case(
        lambda: brainstate.nn.GroupNorm((6,), num_groups=True)(x),
        lambda: GroupNorm((6,), num_groups=True, backend="jax"),
        ArgumentTypeError,
    )


def mask_of_positions(rng):
    x, mask = draw(rng, 2, 8, 6), np.arange(8).reshape(8, 1) < 5
    return Case(
        lambda: Peer((6,), num_groups=3)(x, mask=mask),
        lambda: jitted(x, mask=mask, num_groups=3),
        oracle.group_norm(x, num_groups=3, mask=mask),
    )


def gradient_of_padding(rng):
    mask = np.broadcast_to(np.arange(8).reshape(8, 1) < 5, (2, 8, 6))
    x, dy = np.where(mask, draw(rng, 2, 8, 6), np.float32(np.nan)), draw(rng, 2, 8, 6)
    peer = Peer((6,), num_groups=3)

    def gradient(function):
        return lambda: quick_jit(jax.grad(lambda x: (dy * function(x, mask=mask)).sum()))(x)

    want = oracle.group_norm_gradients(x, dy, num_groups=3, mask=mask)
    return Case(gradient(peer), gradient(functools.partial(group_norm, num_groups=3)), want.x)


@pytest.mark.parametrize("name", DIFFERENT_ON_PURPOSE)
def test_different_on_purpose(name, rng):
    assert_differs(DIFFERENT_ON_PURPOSE[name], globals()[name](rng))


def test_the_page_lists_these_differences():
    assert_listed("brainstate", DIFFERENT_ON_PURPOSE)
