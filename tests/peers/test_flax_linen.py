"""The cases of flax's tests of `linen.GroupNorm`, and those of its layer and instance norm that
are group norms of one group, or of one channel per group.

`GroupNorm` of linen also has the cases that earlier tests of this library compared with it: all
ranks, all reduction axes, a mask with its gradients.
"""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupnorm import GroupNorm, group_norm, group_norm_vjp
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
from tests.rows import CONTRACT, assert_close

DIFFERENT_ON_PURPOSE = {
    "large_mean": Difference(
        "mean 1e4 times the spread",
        "errors above 100: the variance is E[x²] − E[x]²",
        "errors below 5e-6",
        100.0,
    ),
    "large_mean_in_two_passes": Difference(
        "the same with `use_fast_variance=False`, mean 1e5 times the spread",
        "errors above 1e-3: the mean is rounded to float32",
        "errors below 5e-6",
        1e-3,
    ),
    "constant_group": Difference(
        "a constant group",
        "rounding errors divided by sqrt(epsilon), up to 10",
        "the bias, exactly",
        0.1,
    ),
    "huge_values": Difference("values of 1e20", "0: their squares overflow", "normalized", 0.9),
    "tiny_values": Difference(
        "values of 1e-20 without epsilon", "infinite: their squares vanish", "normalized", np.inf
    ),
    "mask_of_positions": Difference(
        "a mask of shape (..., 1)", "raises, although it broadcasts", "any mask that broadcasts",
        "raises",
    ),
    "gradient_of_padding": Difference(
        "padding that is NaN, under a mask", "every gradient is NaN", "padding leaks nowhere",
        "NaN",
    ),
    "sample_without_valid_position": Difference(
        "a sample that is masked out completely",
        "its results are NaN, and the scale's gradient",
        "mean 0, variance 1",
        "NaN",
    ),
    "replicas_with_masks": Difference(
        "replicas whose masks differ, with `axis_name`",
        "the replicas' means are averaged without weights",
        "weighted by the number of valid elements",
        1e-2,
    ),
    "unbound_axis_name": Difference(
        "parameters made outside of the map that binds `axis_name`",
        "raises NameError",
        "the name is looked up in the call",
        "raises",
    ),
    "features_on_the_leading_axis": Difference(
        "instance norm whose features are on the leading axis",
        "raises",
        "there is no batch then",
        "raises",
    ),
}  # fmt: skip


def parameters(rng, *shape) -> tuple:
    return tuple(rng.normal(size=(2, *shape)).astype(np.float32))


def apply(peer, x, scale=None, bias=None, **keywords):
    """Call a linen module with these parameters, compiled."""
    given = {k: v for k, v in {"scale": scale, "bias": bias}.items() if v is not None}
    return jax.jit(peer.apply)({"params": given}, x, **keywords)


def plain(peer, *arguments, **options):
    """Return a linen module without parameters."""
    return peer(*arguments, use_bias=False, use_scale=False, **options)


# Masks ---------------------------------------------------------------------------------------


def masked(rng, *shape):
    """Return x with NaN at masked-out positions, and the mask; two positions are always valid."""
    mask = rng.random(shape) < 0.5
    mask[..., :2] = True
    return np.where(mask, draw(rng, *shape), np.float32(np.nan)), mask


@pytest.mark.parametrize(
    ("peer", "shape", "options"),
    [
        (plain(nn.GroupNorm, 7), (3, 2, 5, 7 * 11), {"num_groups": 7}),
        (plain(nn.LayerNorm), (3, 4, 5), {"num_groups": 1, "reduction_axes": -1}),
    ],
    ids=["group norm", "layer norm"],
)
def test_valid_positions_are_normalized_and_the_others_are_not_read(peer, shape, options, rng):
    x, mask = masked(rng, *shape)
    ours = np.asarray(jitted(x, mask=mask, **options))
    theirs = apply(peer, x, mask=mask)
    want = oracle.group_norm(x, mask=mask, **options)
    assert_close(ours, want, tolerance=2 * CONTRACT)
    assert_close(np.asarray(theirs)[mask], want[mask], tolerance=4 * CONTRACT)
    groups = (x.shape[0], -1, options["num_groups"], x.shape[-1] // options["num_groups"])
    axes = (1, 3) if options["num_groups"] > 1 else (3,)
    valid = {"axis": axes, "where": mask.reshape(groups)}
    np.testing.assert_allclose(ours.reshape(groups).mean(**valid), 0, atol=1e-5)
    np.testing.assert_allclose(ours.reshape(groups).var(**valid), 1, atol=1e-4)


def test_a_mask_and_its_gradients(rng):
    x, dy = draw(rng, 2, 5, 6), draw(rng, 2, 5, 6)
    scale, bias = parameters(rng, 6)
    mask = np.broadcast_to(rng.random((2, 5, 1)) < 0.7, x.shape)
    peer = nn.GroupNorm(3, use_fast_variance=False)

    def theirs(x, scale, bias):
        return peer.apply({"params": {"scale": scale, "bias": bias}}, x, mask=mask)

    def ours(x, scale, bias):
        return group_norm(x, scale, bias, num_groups=3, mask=mask)

    def differentiated(function):
        y, pullback = jax.vjp(function, x, scale, bias)
        return y, pullback(dy)

    y, peer_gradients = jax.jit(differentiated, static_argnums=0)(theirs)
    z, gradients = jax.jit(differentiated, static_argnums=0)(ours)
    assert_all_agree(y, z, oracle.group_norm(x, scale, bias, num_groups=3, mask=mask))
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=3, mask=mask)
    for peers, got, reference in zip(peer_gradients, gradients, want, strict=True):
        np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(peers, reference, rtol=1e-4, atol=1e-4)


# Axes and groups -------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 6), (2, 4, 5, 6), (2, 3, 2, 4, 6)], ids=str)
def test_every_rank(shape, fast, rng):
    x, (scale, bias) = draw(rng, *shape), parameters(rng, 6)
    ours = jitted(x, scale, bias, num_groups=3, use_fast_variance=fast)
    theirs = apply(nn.GroupNorm(3, use_fast_variance=False), x, scale, bias)
    assert_all_agree(theirs, ours, oracle.group_norm(x, scale, bias, num_groups=3))


FLAX_OWN = [((2, 5, 4, 4, 32), None), ((2, 5, 4, 4, 32), (0, 1, 3, 4)), ((3, 4, 32), (-3, -2, -1))]
EVERY_SET = [
    ((2, 4, 5, 6), axes)
    for size in range(1, 5)
    for axes in itertools.combinations(range(4), size)
    if 3 in axes  # the features
]


@pytest.mark.parametrize(("shape", "axes"), FLAX_OWN + EVERY_SET, ids=str)
def test_reduction_axes(shape, axes, rng):
    x, options = draw(rng, *shape), {"num_groups": 2, "epsilon": 1e-5, "reduction_axes": axes}
    peer = plain(nn.GroupNorm, use_fast_variance=False, **options)
    ours = jitted(x, **options)
    assert ours.shape == x.shape
    assert_all_agree(apply(peer, x), ours, oracle.group_norm(x, **options))


def test_axes_counted_from_the_end_allow_a_new_batch_axis(rng):
    x, options = draw(rng, 3, 4, 32), {"num_groups": 2, "reduction_axes": (-3, -2, -1)}
    alone, copies = jitted(x, **options), np.stack([x] * 5)
    stacked = jitted(copies, **options)
    np.testing.assert_allclose(stacked, np.stack([alone] * 5), atol=1e-6)
    theirs = apply(plain(nn.GroupNorm, **options), copies)
    assert_all_agree(theirs, stacked, oracle.group_norm(copies, **options))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_groups": 3}, "num_groups"),
        ({"num_groups": 2, "reduction_axes": (0, 1, 2, 3)}, "reduction_axes"),
        ({"num_groups": 4, "group_size": 8}, "group_size"),
        ({"num_groups": None}, "num_groups"),
        ({"num_groups": None, "group_size": 5}, "group_size"),
        ({"num_groups": 0}, "num_groups"),
    ],
    ids=str,
)
def test_errors(options, match, rng):
    x = draw(rng, 2, 3, 2, 2, 32)
    peer = plain(nn.GroupNorm, **options)
    assert_same_error(
        lambda: peer.apply({}, x), lambda: group_norm(jnp.asarray(x), **options), match=match
    )


# Layer norm and instance norm --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "offset"),
    [((-1,), 0), ((1,), 0), ((1, 2), 0), ((0, 1, 2), 0), ((-1,), 1e6)],
    ids=str,
)
def test_layer_norm_is_one_group(axes, offset, rng):
    """A mean of 1e6 is flax's own case of two passes, with errors up to 1e-3 allowed."""
    x, fast = draw(rng, 2, 3, 4) + np.float32(offset), not offset
    options = {"num_groups": 1, "feature_axis": axes[-1], "reduction_axes": axes, "epsilon": 1e-5}
    peer = plain(nn.LayerNorm, reduction_axes=axes, epsilon=1e-5, use_fast_variance=fast)
    ours = jitted(x, use_fast_variance=fast, **options)
    loose = 0.1 if offset else None
    assert_all_agree(apply(peer, x), ours, oracle.group_norm(x, **options), peer=loose)


@pytest.mark.parametrize(
    ("features", "offset"),
    [((-1,), 0), ((1, 2), 0), ((1, 2, 3), 0), ((1, 3), 0), ((-1,), 1e4)],
    ids=str,
)
def test_instance_norm_is_one_channel_per_group(features, offset, rng):
    x, fast = draw(rng, 2, 3, 4, 5) + np.float32(offset), not offset
    scale, bias = parameters(rng, *(x.shape[axis] for axis in features))
    options = {"num_groups": None, "group_size": 1, "feature_axis": features, "epsilon": 1e-5}
    peer = nn.InstanceNorm(feature_axes=features, epsilon=1e-5, use_fast_variance=fast)
    ours = jitted(x, scale, bias, use_fast_variance=fast, **options)
    want = oracle.group_norm(x, scale, bias, **options)
    loose = 0.1 if offset else 1e-4
    assert_all_agree(apply(peer, x, scale, bias), ours, want, peer=loose)


@pytest.mark.parametrize(
    ("peer", "options"),
    [
        (nn.LayerNorm(reduction_axes=(1, 2, 3)), {"num_groups": 1}),
        (nn.InstanceNorm(), {"num_groups": None, "group_size": 1}),
    ],
    ids=["layer norm", "instance norm"],
)
def test_layers_that_are_group_norms(peer, options, rng):
    """Their parameters have the same shapes, and with equal ones the results are equal."""
    x = draw(rng, 2, 3, 4, 5)
    variables = jax.jit(peer.init)(jax.random.key(0), x)["params"]
    layer = GroupNorm(5, backend="jax", **options)
    for name in ("scale", "bias"):
        np.testing.assert_array_equal(variables[name], getattr(layer, name))
    scale, bias = parameters(rng, 5)
    ours = jitted(x, scale, bias, **options)
    want = oracle.group_norm(x, scale, bias, **options)
    assert_all_agree(apply(peer, x, scale, bias), ours, want)
    assert_all_agree(apply(nn.GroupNorm(**options), x, scale, bias), ours, want)


# Differences ---------------------------------------------------------------------------------


def values(x, peer, **options) -> Case:
    """Return the case of a plain call of both."""
    want = oracle.group_norm(x, **options)
    return Case(lambda: apply(peer, x), lambda: jitted(x, **options), want)


def large_mean(rng):
    return values(draw(rng, 2, 8, 8, 6) + np.float32(1e4), plain(nn.GroupNorm, 3), num_groups=3)


def large_mean_in_two_passes(rng):
    peer = plain(nn.GroupNorm, 3, use_fast_variance=False)
    return values(draw(rng, 2, 8, 8, 6) + np.float32(1e5), peer, num_groups=3)


def constant_group(rng):
    return values(np.full((2, 8, 8, 6), 10000.1, np.float32), plain(nn.GroupNorm, 3), num_groups=3)


def huge_values(rng):
    return values(np.float32(1e20) * draw(rng, 2, 8, 8, 6), plain(nn.GroupNorm, 3), num_groups=3)


def tiny_values(rng):
    peer = plain(nn.GroupNorm, 3, epsilon=0)
    x = np.float32(1e-20) * draw(rng, 2, 8, 8, 6)
    return values(x, peer, num_groups=3, epsilon=0)


def mask_of_positions(rng):
    x, mask = draw(rng, 2, 8, 6), np.arange(8).reshape(8, 1) < 5
    return Case(
        lambda: apply(plain(nn.GroupNorm, 3), x, mask=mask),
        lambda: jitted(x, num_groups=3, mask=mask),
        oracle.group_norm(x, num_groups=3, mask=mask),
    )


def scale_gradient(x, mask, rng) -> Case:
    dy, (scale, bias) = draw(rng, *x.shape), parameters(rng, 6)

    def theirs(scale):
        peer = nn.GroupNorm(3, use_fast_variance=False)
        return (dy * peer.apply({"params": {"scale": scale, "bias": bias}}, x, mask=mask)).sum()

    @quick_jit
    def ours(x, scale, bias):
        return group_norm_vjp(x, scale, bias, num_groups=3, mask=mask)[1](jnp.asarray(dy)).scale

    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=3, mask=mask)
    return Case(lambda: jax.jit(jax.grad(theirs))(scale), lambda: ours(x, scale, bias), want.scale)


def gradient_of_padding(rng):
    mask = np.broadcast_to(np.arange(8).reshape(8, 1) < 5, (2, 8, 6))
    return scale_gradient(np.where(mask, draw(rng, 2, 8, 6), np.nan), mask, rng)


def sample_without_valid_position(rng):
    mask = np.broadcast_to(np.arange(2).reshape(2, 1, 1) < 1, (2, 8, 6))
    return scale_gradient(draw(rng, 2, 8, 6), mask, rng)


def replicas_with_masks(rng):
    """Two replicas hold halves of every sample; the second has one valid position."""
    x = draw(rng, 2, 3, 4, 6)  # replica, batch, position, channel
    mask = np.broadcast_to(np.arange(8).reshape(2, 1, 4, 1) < 5, x.shape)
    peer = plain(nn.GroupNorm, 3, axis_name="replicas")

    def mapped(function):
        return lambda: quick_jit(jax.vmap(function, axis_name="replicas"))(x, mask)

    def whole(a):
        return np.moveaxis(a, 0, 1).reshape(3, 8, 6)

    def ours(x, mask):
        return group_norm(x, num_groups=3, mask=mask, axis_name="replicas")

    want = oracle.group_norm(whole(x), num_groups=3, mask=whole(mask))
    return Case(
        mapped(lambda x, mask: peer.apply({}, x, mask=mask)),
        mapped(ours),
        np.moveaxis(want.reshape(3, 2, 4, 6), 1, 0),
    )


def unbound_axis_name(rng):
    x = draw(rng, 2, 3, 6)  # replica, batch, channel

    def ours():
        layer = GroupNorm(6, num_groups=3, axis_name="replicas", backend="jax")
        return quick_jit(jax.vmap(layer, axis_name="replicas"))(x)

    return Case(
        lambda: nn.GroupNorm(3, axis_name="replicas").init(jax.random.key(0), x[0])["params"],
        ours,
        np.moveaxis(oracle.group_norm(np.moveaxis(x, 0, 1), num_groups=3,
                                      reduction_axes=(1, 2)), 1, 0),
    )  # fmt: skip


def features_on_the_leading_axis(rng):
    x, options = draw(rng, 4, 3, 5), {"num_groups": 4, "feature_axis": 0}
    return values(x, plain(nn.InstanceNorm, feature_axes=0), **options)


@pytest.mark.parametrize("name", DIFFERENT_ON_PURPOSE)
def test_different_on_purpose(name, rng):
    assert_differs(DIFFERENT_ON_PURPOSE[name], globals()[name](rng))


def test_the_page_lists_these_differences():
    assert_listed("flax linen", DIFFERENT_ON_PURPOSE)
