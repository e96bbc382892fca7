"""The cases of flax's tests of `nnx.GroupNorm`, and of nnx's instance and layer norm."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from groupnorm import GroupNorm, group_norm
from groupnorm.errors import ArgumentTypeError
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
        "mean 1e4 times the spread",
        "errors above 100: the variance is E[x²] − E[x]²",
        "errors below 5e-6",
        100.0,
    ),
    "small_groups": Difference(
        "groups of two channels whose values differ by 1e-3",
        "errors above 1e-2, for the same reason",
        "errors below 5e-6",
        1e-2,
    ),
    "half_precision_result": Difference(
        "float32 data of mean 1e3, with `dtype=float16`",
        "x is rounded to float16 before its statistics are taken",
        "only the result is rounded",
        0.1,
    ),
    "features_alone": Difference(
        "`reduction_axes=-1`, the features alone",
        "wrong: statistics are repeated along axis 1",
        "right for every set of axes with the features",
        1.0,
    ),
    "some_axes": Difference(
        "`reduction_axes` without one of the spatial axes", "wrong, in the same way", "right", 1.0
    ),
    "batch_and_features": Difference(
        "`reduction_axes=(0, -1)`", "wrong, in the same way", "right", 1.0
    ),
    "every_axis": Difference("`reduction_axes` of all axes", "raises", "right", "raises"),
    "one_axis": Difference(
        "an input with one axis", "raises", "everything is reduced: there is no batch", "raises"
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


def peer_of(layer, *arguments, scale=None, bias=None, **options):
    """Return a layer of nnx with these parameters."""
    peer = layer(*arguments, rngs=nnx.Rngs(0), **options)
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            getattr(peer, name)[...] = jnp.asarray(value)
    return peer


def keep_dtype(arrays, **keywords):
    """Promote nothing before the statistics, as linen does."""
    return arrays


FAST = pytest.mark.parametrize("fast", [True, False])
MIXED = [("float32", "float16"), ("float16", "float32")]
EVERY = [*MIXED, ("float32", "float32"), ("float16", "float16")]
# The fast variance of groups of two almost equal elements has few digits.
PEER = {True: 0.1, False: 1e-3}


@FAST
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    ("layer", "num_groups", "dtype", "param_dtype"),
    [
        *(("GroupNorm", 3, *dtypes) for dtypes in EVERY),
        *(("LayerNorm", 1, *dtypes) for dtypes in MIXED),
    ],
)
def test_dtypes_of_result_and_parameters(layer, num_groups, dtype, param_dtype, masked, fast, rng):
    """flax's mask leaves one valid channel in each group of two, which then has no variance."""
    x = draw(rng, 10, 6)
    scale, bias = rng.normal(size=(2, 6)).astype(param_dtype)
    mask = np.array([True, False, True, False, True, False]) if masked else None
    common = {"dtype": dtype, "use_fast_variance": fast}
    options = {"param_dtype": param_dtype, "promote_dtype": keep_dtype, **common}
    arguments = (6, 3) if layer == "GroupNorm" else (6,)
    peer = peer_of(getattr(nnx, layer), *arguments, scale=scale, bias=bias, **options)
    ours = jitted(x, scale, bias, mask, num_groups=num_groups, **common)
    want = oracle.group_norm(x, scale, bias, num_groups=num_groups, mask=mask)
    theirs = jax.jit(lambda x: peer(x, mask=mask))(x)
    tolerance = HALF.get(dtype, 2 * CONTRACT)
    assert_all_agree(theirs, ours, want, tolerance=tolerance, peer=PEER[fast])


@FAST
@pytest.mark.parametrize(("dtype", "param_dtype"), MIXED)
@pytest.mark.parametrize("shape", [(10, 6), (3, 5, 6)], ids=str)
def test_instance_norm(shape, dtype, param_dtype, fast, rng):
    """Without spatial axes every group is one element: the result is the bias."""
    x, common = draw(rng, *shape), {"dtype": dtype, "use_fast_variance": fast}
    peer = peer_of(nnx.InstanceNorm, 6, param_dtype=param_dtype, **common)
    options = {"num_groups": None, "group_size": 1}
    layer = GroupNorm(6, param_dtype=param_dtype, backend="jax", **options, **common)
    want = oracle.group_norm(x, **options)
    tolerance = HALF.get(dtype, 2 * CONTRACT)
    assert_all_agree(jax.jit(peer)(x), quick_jit(layer)(x), want, tolerance=tolerance, peer=0.01)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 6), (2, 4, 5, 6), (2, 3, 2, 4, 6)], ids=str)
def test_every_rank(shape, rng):
    x, (scale, bias) = draw(rng, *shape), draw(rng, 2, 6)
    peer = peer_of(nnx.GroupNorm, 6, 3, scale=scale, bias=bias, use_fast_variance=False)
    ours = jitted(x, scale, bias, num_groups=3)
    assert_all_agree(jax.jit(peer)(x), ours, oracle.group_norm(x, scale, bias, num_groups=3))


@pytest.mark.parametrize(
    "options",
    [
        {"num_groups": 4},
        {"num_groups": -3},
        {"num_groups": None},
        {"num_groups": 3, "group_size": 2},
        {"num_groups": None, "group_size": 4},
    ],
    ids=str,
)
def test_errors(options):
    assert_same_error(
        lambda: nnx.GroupNorm(6, rngs=nnx.Rngs(0), **options),
        lambda: GroupNorm(6, backend="jax", **options),
        match="num_groups|group_size",
    )


def test_initializers_are_no_part_of_the_graph():
    """Layers that differ in nothing but the values of their parameters have equal trees."""
    zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
    peers, ours = [], []
    for init in (zeros, ones):
        options = {"scale_init": init, "bias_init": init}
        peers.append(nnx.graphdef(nnx.GroupNorm(6, 3, rngs=nnx.Rngs(0), **options)))
        ours.append(GroupNorm(6, num_groups=3, backend="jax", **options))
    assert peers[0] == peers[1]
    assert jax.tree.structure(ours[0]) == jax.tree.structure(ours[1])
    np.testing.assert_array_equal(ours[0].scale, np.zeros(6))
    np.testing.assert_array_equal(ours[1].bias, np.ones(6))


def test_metadata_of_parameters():
    """A sharding that is a variable's metadata: nnx has arguments, here it is the type's."""
    sharding = ("channels",)
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1,), sharding, axis_types=auto)):
        metadata = {f"{name}_metadata": {"out_sharding": sharding} for name in ("scale", "bias")}
        peer = nnx.GroupNorm(6, 3, rngs=nnx.Rngs(0), **metadata)
        param_type = functools.partial(nnx.Param, out_sharding=sharding)
        layer = GroupNorm(6, num_groups=3, backend="jax", param_type=param_type)
    variables = jax.tree.leaves(layer, is_leaf=lambda node: isinstance(node, nnx.Variable))
    assert len(variables) == 2
    for theirs, ours in zip((peer.scale, peer.bias), variables, strict=True):
        assert theirs.out_sharding == ours.out_sharding == sharding
        assert theirs.shape == ours.shape == (6,)


# Differences ---------------------------------------------------------------------------------


def values(x, **options) -> Case:
    """Return the case of a plain call of both; the peer is made in the call."""
    want = oracle.group_norm(x, **{k: v for k, v in options.items() if k != "dtype"})
    return Case(
        lambda: jax.jit(lambda x: peer_of(nnx.GroupNorm, x.shape[-1], **options)(x))(x),
        lambda: jitted(x, **options),
        want,
        tolerance=HALF.get(options.get("dtype"), 2 * CONTRACT),
    )


def large_mean(rng):
    return values(draw(rng, 2, 8, 8, 6) + np.float32(1e4), num_groups=3)


def small_groups(rng):
    return values(1 + np.float32(1e-3) * draw(rng, 10, 6), num_groups=3)


def half_precision_result(rng):
    return values(draw(rng, 2, 8, 8, 6) + np.float32(1e3), num_groups=3, dtype="float16")


def reduction_axes(rng, *axes):
    return values(draw(rng, 2, 4, 4, 6), num_groups=3, reduction_axes=axes)


def features_alone(rng):
    return reduction_axes(rng, -1)


def some_axes(rng):
    return reduction_axes(rng, 2, -1)


def batch_and_features(rng):
    return reduction_axes(rng, 0, -1)


def every_axis(rng):
    return reduction_axes(rng, 0, 1, 2, -1)


def one_axis(rng):
    return values(draw(rng, 6), num_groups=3)


def numpy_integers(rng):
    return values(draw(rng, 2, 4, 6), num_groups=np.int64(3))


def bool_for_an_integer(rng):
    x = jnp.zeros((2, 4, 6))
    return values(x, num_groups=1)._replace(
        theirs=lambda: peer_of(nnx.GroupNorm, 6, num_groups=True)(x),
        ours=lambda: group_norm(x, num_groups=True),
        want=ArgumentTypeError,
    )


def mask_of_positions(rng):
    x, mask = draw(rng, 2, 8, 6), np.arange(8).reshape(8, 1) < 5
    return Case(
        lambda: peer_of(nnx.GroupNorm, 6, 3)(x, mask=mask),
        lambda: jitted(x, mask=mask, num_groups=3),
        oracle.group_norm(x, num_groups=3, mask=mask),
    )


def gradient_of_padding(rng):
    mask = np.broadcast_to(np.arange(8).reshape(8, 1) < 5, (2, 8, 6))
    x, dy = np.where(mask, draw(rng, 2, 8, 6), np.float32(np.nan)), draw(rng, 2, 8, 6)
    peer = peer_of(nnx.GroupNorm, 6, 3)

    def gradient(function):
        return lambda: quick_jit(jax.grad(lambda x: (dy * function(x, mask=mask)).sum()))(x)

    want = oracle.group_norm_gradients(x, dy, num_groups=3, mask=mask)
    return Case(gradient(peer), gradient(functools.partial(group_norm, num_groups=3)), want.x)


@pytest.mark.parametrize("name", DIFFERENT_ON_PURPOSE)
def test_different_on_purpose(name, rng):
    assert_differs(DIFFERENT_ON_PURPOSE[name], globals()[name](rng))


def test_the_page_lists_these_differences():
    assert_listed("flax nnx", DIFFERENT_ON_PURPOSE)
