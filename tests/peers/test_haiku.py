"""The cases of haiku's tests of `hk.GroupNorm`."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupnorm import GroupNorm, group_norm, initializers
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
    "half_precision_input": Difference(
        "float16 data of spread 1e3", "0: the variance is taken in float16", "normalized", 0.9
    ),
    "axes_from_the_end": Difference(
        "channels first, and normalized axes counted from the end",
        "wrong: the batch is normalized, and the channels are not",
        "right",
        0.1,
    ),
    "without_the_channels": Difference(
        "normalized axes without that of the channels",
        "normalizes each channel's place within the groups",
        "raises",
        "accepts",
    ),
    "empty_samples": Difference("samples without positions", "raises", "empty results", "raises"),
}


def options_for(data_format, **options):
    first = data_format.startswith("NC") or data_format == "channels_first"
    return {"num_groups": 5, "feature_axis": 1 if first else -1, "epsilon": 1e-5, **options}


def peer_call(x, scale=None, offset=None, *, groups=5, **options):
    """Call a haiku layer without parameters of its own."""
    function = hk.without_apply_rng(
        hk.transform(
            lambda x, scale, offset: hk.GroupNorm(
                groups, create_scale=False, create_offset=False, **options
            )(x, scale, offset)
        )
    )
    return jax.jit(function.apply)({}, x, scale, offset)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("affine", ["none", "own", "in the call"])
def test_ones_give_exactly_the_offset(affine, data_format):
    channels_first = data_format == "NCHW"
    x = np.ones((2, 10, 3, 3) if channels_first else (2, 3, 3, 10), np.float32)
    options = options_for(data_format)
    if affine == "own":
        size = (10, ...) if channels_first else 10
        options["feature_axis"] = 0 if channels_first else -1
        half, two = initializers.constant(0.5), initializers.constant(2.0)
        layer = GroupNorm(size, backend="jax", scale_init=half, bias_init=two, **options)
        y = quick_jit(layer)(x)
    elif affine == "in the call":
        scale, bias = np.full(10, 0.5, np.float32), np.full(10, 2, np.float32)
        y = jitted(x, scale, bias, **options)
    else:
        y = jitted(x, **options)
    np.testing.assert_array_equal(y, np.full(x.shape, 0 if affine == "none" else 2))


@pytest.mark.parametrize(
    ("shape", "data_format"),
    [((3, 4, 10), "NCW"), ((3, 4, 4, 10), "NCHW"), ((3, 4, 4, 4, 10), "NCDHW")],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_channels_first_and_last_agree(shape, data_format, affine, rng):
    last = rng.uniform(0, 10, size=shape).astype(np.float32)
    first = np.moveaxis(last, -1, 1)
    scale, bias = 1 + draw(rng, 2, 10) if affine else (None, None)
    results = []
    for x, form in ((last, "channels_last"), (first, data_format)):
        options = options_for(form)
        trailing = (-1, *[1] * (x.ndim - 2)) if options["feature_axis"] == 1 else (-1,)
        given = [None if a is None else a.reshape(trailing) for a in (scale, bias)]
        ours = jitted(x, scale, bias, **options)
        want = oracle.group_norm(x, scale, bias, **options)
        assert_all_agree(peer_call(x, *given, data_format=form), ours, want)
        results.append(np.asarray(ours))
    np.testing.assert_allclose(results[0], np.moveaxis(results[1], 1, -1), atol=1e-5)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_parameters_of_the_layer(data_format, rng):
    """haiku's are (C,), or (C, 1, 1) with channels first; ours are (C,)."""
    x = draw(rng, 2, 10, 10, 10)
    transformed = hk.without_apply_rng(
        hk.transform(lambda x: hk.GroupNorm(5, data_format=data_format)(x))
    )
    variables = jax.jit(transformed.init)(jax.random.key(0), x)["group_norm"]
    options = options_for(data_format)
    first = options["feature_axis"] == 1
    layer = GroupNorm((10, ...) if first else 10, backend="jax",
                      **{**options, "feature_axis": 0 if first else -1})  # fmt: skip
    assert variables["scale"].shape == ((10, 1, 1) if first else (10,))
    np.testing.assert_array_equal(variables["scale"].ravel(), layer.scale)
    np.testing.assert_array_equal(variables["offset"].ravel(), layer.bias)
    theirs = jax.jit(transformed.apply)({"group_norm": variables}, x)
    assert_all_agree(theirs, quick_jit(layer)(x), oracle.group_norm(x, **options))


@pytest.mark.parametrize("axes", [slice(1, None), slice(2, None), (1, 2, 3), (0, 2, 3)], ids=str)
def test_normalized_axes(axes, rng):
    """haiku's slices are lists of axes here; slice(2, None) leaves out the time of a series."""
    x = draw(rng, 3, 4, 4, 10)
    listed = tuple(range(4)[axes]) if isinstance(axes, slice) else axes
    options = options_for("NHWC", reduction_axes=listed)
    want = oracle.group_norm(x, **options)
    assert_all_agree(peer_call(x, axis=axes), jitted(x, **options), want)


def test_one_layer_for_inputs_of_several_ranks(rng):
    """haiku's layer, which is initialized by its first input, refuses other ranks."""
    layer = GroupNorm(5, num_groups=5, backend="jax", epsilon=1e-5)
    for shape in ((2, 3, 3, 5), (2, 3, 3, 4, 5)):
        x = draw(rng, *shape)
        want = oracle.group_norm(x, num_groups=5, epsilon=1e-5)
        np.testing.assert_allclose(quick_jit(layer)(x), want, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 3, 8)], ids=str)
def test_channels_that_the_groups_do_not_divide(shape):
    x = jnp.ones(shape)
    assert_same_error(
        lambda: peer_call(x), lambda: group_norm(x, num_groups=5), match="num_groups=5"
    )


def made(**options):
    """Make a haiku layer, in the transformation that its constructor needs."""
    return hk.transform(lambda: hk.GroupNorm(5, **options) and None).init(None)


@pytest.mark.parametrize("data_format", ["NHW", "HWC", "channel_last"])
def test_there_is_no_name_for_the_layout(data_format):
    """`feature_axis` has no names that could be misspelt."""
    options = {"num_groups": 5, "feature_axis": data_format}
    assert_same_error(lambda: made(data_format=data_format),
                      lambda: group_norm(jnp.ones((2, 5)), **options),
                      match="feature_axis")  # fmt: skip


@pytest.mark.parametrize("axis", ["foo", ["foo"]], ids=str)
def test_axes_that_are_no_integers(axis):
    options = {"num_groups": 5, "reduction_axes": axis}
    assert_same_error(lambda: made(axis=axis), lambda: group_norm(jnp.ones((2, 5)), **options),
                      match="reduction_axes")  # fmt: skip


@pytest.mark.parametrize("which", ["scale", "offset"])
def test_an_initializer_without_its_parameter_is_not_used(which):
    """haiku refuses it. brainstate, whose parameters these are, does not, and so do we not."""
    with pytest.raises(ValueError, match=f"{which}_init"):
        made(**{f"create_{which}": False, f"{which}_init": jnp.ones})
    name = {"scale": "scale", "offset": "bias"}[which]
    options = {f"use_{name}": False, f"{name}_init": initializers.constant(2.0)}
    layer = GroupNorm(10, num_groups=5, backend="jax", **options)
    assert getattr(layer, name) is None


@pytest.mark.parametrize("which", ["scale", "bias"])
def test_a_layer_takes_no_parameters_in_the_call(which):
    """haiku: a ValueError if the layer has its own. Here parameters are given to the function."""
    layer = GroupNorm(5, num_groups=5, backend="jax")
    with pytest.raises(TypeError, match=which):
        layer(jnp.ones((2, 3, 5)), **{which: jnp.ones(4)})
    with pytest.raises(ValueError, match=which):
        group_norm(jnp.ones((2, 3, 5)), num_groups=5, **{which: jnp.ones(4)})


# Differences ---------------------------------------------------------------------------------


def values(x, peer_axes=slice(1, None), tolerance=1e-5, data_format="NCHW", **options) -> Case:
    given = options_for(data_format, num_groups=3, **options)
    return Case(
        lambda: peer_call(x, groups=3, data_format=data_format, axis=peer_axes),
        lambda: jitted(x, **given),
        oracle.group_norm(x, **given),
        tolerance,
    )


def large_mean(rng):
    return values(draw(rng, 2, 6, 8, 8) + np.float32(1e5))


def constant_group(rng):
    return values(np.full((2, 6, 8, 8), 10000.1, np.float32))


def huge_values(rng):
    return values(np.float32(1e20) * draw(rng, 2, 6, 8, 8))


def half_precision_input(rng):
    x = (np.float32(1e3) * draw(rng, 2, 6, 8, 8)).astype(np.float16)
    return values(x, tolerance=HALF["float16"])


def axes_from_the_end(rng):
    return values(draw(rng, 2, 6, 8, 8), peer_axes=(-3, -2, -1))


def without_the_channels(rng):
    x = jnp.zeros((2, 8, 8, 6))
    return Case(
        lambda: peer_call(x, groups=3, axis=(1, 2)),
        lambda: group_norm(x, num_groups=3, reduction_axes=(1, 2)),
        ValueError,
    )


def empty_samples(rng):
    return values(draw(rng, 2, 0, 6), data_format="NWC")


@pytest.mark.parametrize("name", DIFFERENT_ON_PURPOSE)
def test_different_on_purpose(name, rng):
    assert_differs(DIFFERENT_ON_PURPOSE[name], globals()[name](rng))


def test_the_page_lists_these_differences():
    assert_listed("haiku", DIFFERENT_ON_PURPOSE)
