"""What the native modules have beyond a plain call: masks, metadata, names, symbolic calls."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import doctest
import importlib
import inspect

import numpy as np
import pytest

import groupnorm
from groupnorm import GroupNorm
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, assert_close

CHANNELS, GROUPS = 8, 2
JAX_FRAMEWORKS = [
    pytest.param(name, marks=pytest.mark.needs("jax", name))
    for name in ("flax", "equinox", "haiku", "brainstate")
]

KERAS = pytest.param("keras", marks=pytest.mark.needs("keras", "torch"))


@pytest.fixture
def padded(rng):
    """Two clips, the second of which is shorter; the padding is NaN."""
    x = rng.normal(size=(2, 10, CHANNELS)).astype(np.float32)
    x[1, 6:] = np.nan
    mask = np.arange(10) < np.array([10, 6])[:, None]
    return x, mask


def assert_masked(y, padded, epsilon) -> None:
    x, mask = padded
    want = oracle.group_norm(x, num_groups=GROUPS, epsilon=epsilon, mask=mask[..., None])
    assert_close(np.asarray(y)[mask], want[mask], tolerance=2 * CONTRACT)
    assert np.isfinite(np.asarray(y)).all()


def call(name, x, mask):
    """Return the results of a framework's module, with its default epsilon, and that."""
    import jax

    x, mask = jax.numpy.asarray(x), jax.numpy.asarray(mask)[..., None]
    if name == "flax":
        from flax import nnx

        linen = groupnorm.flax.linen.GroupNorm(GROUPS)
        variables = linen.init(jax.random.key(0), x)
        layer = groupnorm.flax.nnx.GroupNorm(CHANNELS, GROUPS, rngs=nnx.Rngs(0))
        return [layer(x, mask=mask), linen.apply(variables, x, mask=mask)], 1e-6
    if name == "equinox":
        layer = groupnorm.equinox.GroupNorm(GROUPS, CHANNELS)
        first, masks = jax.numpy.moveaxis(x, -1, 1), jax.numpy.moveaxis(mask, -1, 1)
        y = jax.vmap(lambda x, mask: layer(x, mask=mask))(first, masks)
        return [jax.numpy.moveaxis(y, 1, -1)], 1e-5
    if name == "haiku":
        import haiku

        model = haiku.without_apply_rng(
            haiku.transform(lambda x, mask: groupnorm.haiku.GroupNorm(GROUPS)(x, mask=mask))
        )
        return [model.apply(model.init(None, x, mask), x, mask)], 1e-5
    layer = groupnorm.brainstate.GroupNorm((10, CHANNELS), num_groups=GROUPS)
    return [layer(x, mask=mask)], 1e-6


@pytest.mark.parametrize(
    "name", [*JAX_FRAMEWORKS, pytest.param("keras", marks=pytest.mark.needs("keras", "torch"))]
)
def test_examples_in_docstrings(name):
    names = ("flax.nnx", "flax.linen") if name == "flax" else (name,)
    for module in names:
        failed, tried = doctest.testmod(importlib.import_module(f"groupnorm.{module}"))
        assert tried
        assert not failed


@pytest.mark.parametrize("name", JAX_FRAMEWORKS)
def test_masks(name, padded):
    found, epsilon = call(name, *padded)
    for y in found:
        assert_masked(y, padded, epsilon)


@pytest.mark.needs("jax", "flax")
def test_flax_signatures_are_those_of_flax():
    from flax import linen, nnx

    for ours, theirs in (
        (groupnorm.flax.nnx.GroupNorm, nnx.GroupNorm),
        (groupnorm.flax.linen.GroupNorm, linen.GroupNorm),
    ):
        for method in ("__init__", "__call__"):
            own, peer = (inspect.signature(getattr(c, method)) for c in (ours, theirs))
            assert list(own.parameters) == list(peer.parameters)


@pytest.mark.needs("jax", "flax")
def test_nnx_tools_know_the_module(rng):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, CHANNELS, rngs=rngs)
            self.norm = groupnorm.flax.nnx.GroupNorm(CHANNELS, GROUPS, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    model = Model(nnx.Rngs(0))
    assert ("norm",) in [path for path, _ in nnx.iter_modules(model)]
    x = np.zeros((2, 5, 3), np.float32)
    assert "GroupNorm" in nnx.tabulate(model, x)
    with_metadata = groupnorm.flax.nnx.GroupNorm(
        CHANNELS, GROUPS, rngs=nnx.Rngs(0), scale_metadata={"tag": "a"}
    )
    assert with_metadata.scale.get_metadata("tag") == "a"


@pytest.mark.needs("jax", "flax")
def test_nnx_own_promotion_is_called():
    from flax import nnx

    def to_half(arrays, *, dtype=None):
        return [None if a is None else a.astype("float16") for a in arrays]

    layer = groupnorm.flax.nnx.GroupNorm(CHANNELS, GROUPS, rngs=nnx.Rngs(0), promote_dtype=to_half)
    assert layer(np.ones((2, CHANNELS), np.float32)).dtype == "float16"


@pytest.mark.needs("jax", "flax")
def test_linen_is_initialized_outside_of_the_map_of_its_axis(rng):
    import jax

    layer = groupnorm.flax.linen.GroupNorm(GROUPS, axis_name="i")
    x = rng.normal(size=(3, 2, 5, CHANNELS)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x[0])
    y = jax.vmap(lambda x: layer.apply(variables, x), axis_name="i")(x)
    whole = np.concatenate(list(x), axis=1)
    want = oracle.group_norm(whole, num_groups=GROUPS)
    assert_close(np.concatenate(list(np.asarray(y)), axis=1), want, tolerance=2 * CONTRACT)


@pytest.mark.needs("jax", "haiku")
@pytest.mark.parametrize("axis", [slice(1, None), slice(2, None), (1,), (-1,), (0, 1, 2), (-2, -1)])
def test_haiku_axes(axis, rng):
    """As haiku for axes from the front; those from the end are the same axes."""
    import haiku

    x = rng.normal(size=(3, 5, CHANNELS)).astype(np.float32)
    axes = tuple(range(3))[axis] if isinstance(axis, slice) else tuple(a % 3 for a in axis)

    def model(cls, axis):
        transformed = haiku.without_apply_rng(haiku.transform(lambda x: cls(GROUPS, axis)(x)))
        return transformed.apply(transformed.init(None, x), x)

    want = model(haiku.GroupNorm, axes)
    np.testing.assert_allclose(model(groupnorm.haiku.GroupNorm, axis), want, rtol=1e-4, atol=1e-5)


@pytest.mark.needs("jax", "haiku")
def test_haiku_scale_and_offset_of_a_call(rng):
    import haiku

    x, scale, offset = rng.normal(size=(3, 2, 5, CHANNELS)).astype(np.float32)
    scale, offset = scale[:, :1], offset[:, :1]  # conditional normalization

    def model(cls, **options):
        f = haiku.transform(lambda x, *own: cls(GROUPS, **options)(x, *own))
        haiku_module = haiku.without_apply_rng(f)
        return haiku_module.apply({}, x, scale, offset)

    created = {"create_scale": False, "create_offset": False}
    want = model(haiku.GroupNorm, **created)
    got = model(groupnorm.haiku.GroupNorm, **created)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentValueError, match="create_scale=False"):
        model(groupnorm.haiku.GroupNorm)


@pytest.mark.needs("jax", "equinox")
def test_equinox_state_key_and_integers(rng):
    import equinox
    import jax

    layer = groupnorm.equinox.GroupNorm(GROUPS, CHANNELS)
    x = jax.numpy.asarray(rng.normal(size=(CHANNELS, 5)), "float32")
    y, state = layer(x, "state", key=jax.random.key(0))
    assert state == "state"
    model = equinox.nn.Sequential([layer, equinox.nn.Lambda(jax.nn.relu)])
    np.testing.assert_array_equal(model(x, key=jax.random.key(0)), jax.nn.relu(y))
    assert isinstance(layer, equinox.nn.GroupNorm)


@pytest.mark.needs("jax", "brainstate")
def test_brainstate_documented_example(rng):
    """Which brainstate's own layer refuses."""
    import brainstate

    x = brainstate.random.normal(size=(3, 4, 5, 6))
    layer = groupnorm.brainstate.GroupNorm(x.shape, num_groups=3)
    want = oracle.group_norm(np.asarray(x), num_groups=3)
    assert_close(np.asarray(layer(x)), want, tolerance=2 * CONTRACT)
    first = groupnorm.brainstate.GroupNorm((6, 4, 5), 0, num_groups=3)
    moved = np.moveaxis(np.asarray(x), -1, 1)
    want = oracle.group_norm(moved, num_groups=3, feature_axis=1)
    assert_close(np.asarray(first(moved)), want, tolerance=2 * CONTRACT)
    with pytest.raises(ArgumentValueError, match="num_groups=4"):
        groupnorm.brainstate.GroupNorm((6,), num_groups=4)


@pytest.mark.needs("jax", "brainstate")
def test_brainstate_attributes_that_are_set(rng):
    x = rng.normal(size=(2, 5, CHANNELS)).astype(np.float32)
    layer = groupnorm.brainstate.GroupNorm((CHANNELS,), num_groups=GROUPS)
    layer.epsilon, layer.num_groups = 0.5, 4
    want = oracle.group_norm(x, num_groups=4, epsilon=0.5)
    assert_close(np.asarray(layer(x)), want, tolerance=2 * CONTRACT)
    assert layer.feature_axes == (0,)


@pytest.mark.needs("torch", "keras")
def test_keras_masks_come_from_the_layers_before(padded):
    import keras

    x, mask = padded
    x = np.where(mask[..., None], x, 0)
    inputs = keras.Input((None, CHANNELS))
    outputs = groupnorm.keras.GroupNormalization(GROUPS)(keras.layers.Masking()(inputs))
    y = keras.Model(inputs, outputs)(x).detach().numpy()
    assert_masked(y, (x, mask), 1e-3)
    ones = np.ones((*mask.shape, 1), bool)
    layer = groupnorm.keras.GroupNormalization(GROUPS)
    want = oracle.group_norm(x, num_groups=GROUPS, epsilon=1e-3)
    assert_close(layer(x, mask=ones).detach().numpy(), want, tolerance=2 * CONTRACT)


@pytest.mark.needs("torch", "keras")
def test_keras_arguments_and_configuration(rng):
    import keras

    layer = groupnorm.keras.GroupNormalization(GROUPS, epsilon=0.5, gamma_initializer="zeros")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    one = groupnorm.keras.GroupNormalization(-1)  # a group for each channel
    x = rng.normal(size=(2, 5, CHANNELS)).astype(np.float32)
    want = oracle.group_norm(x, num_groups=CHANNELS, epsilon=1e-3)
    assert_close(one(x).detach().numpy(), want, tolerance=2 * CONTRACT)
    assert one(x[:, :, None]).shape == (2, 5, 1, CHANNELS)  # another number of axes
    with pytest.raises(ArgumentTypeError, match=r"axis=\(1, 2\)"):
        groupnorm.keras.GroupNormalization(GROUPS, axis=(1, 2))
    with pytest.raises(ArgumentValueError, match="axis=0 is the batch"):
        groupnorm.keras.GroupNormalization(GROUPS, axis=0)


@pytest.mark.needs("jax", "equinox")
def test_equinox_takes_one_sample(rng):
    import jax

    layer = importlib.import_module("groupnorm.equinox").GroupNorm(1, 3)
    x = jax.numpy.asarray(rng.normal(size=(2, 3, 4)), "float32")
    with pytest.raises(ArgumentValueError, match=r"jax\.vmap\(layer\)\(x\)"):
        layer(x)
    want = oracle.group_norm(np.asarray(x), num_groups=1, feature_axis=1, epsilon=1e-5)
    assert_close(np.asarray(jax.vmap(layer)(x)), want, tolerance=2 * CONTRACT)
    mask = [True, True, False, True]
    want = oracle.group_norm(
        np.asarray(x), num_groups=1, feature_axis=1, epsilon=1e-5, mask=np.array(mask)
    )
    got = jax.vmap(lambda x: layer(x, mask=mask))(x)
    assert_close(np.asarray(got), want, tolerance=2 * CONTRACT)
    with pytest.raises(ArgumentValueError, match="mask"):
        jax.jit(lambda x: layer(x, mask=np.full(4, 0.5)))(x[0])


# JAX's own tools, with the layer itself -----------------------------------------------------------


@pytest.mark.needs("jax", "optax")
def test_optax_masks_by_names(rng):
    import jax
    import optax

    layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="jax")
    model = {"norm": layer, "dense": jax.numpy.ones((3, 3))}

    def decays(path, leaf):
        return jax.tree_util.keystr(path, simple=True, separator=".").rpartition(".")[2] != "bias"

    mask = jax.tree_util.tree_map_with_path(decays, model)
    assert (mask["norm"].scale, mask["norm"].bias, mask["dense"]) == (True, False, True)
    decay = optax.masked(optax.add_decayed_weights(0.5), mask)
    gradient = jax.tree.map(jax.numpy.zeros_like, model)
    updates, _ = decay.update(gradient, decay.init(model), model)
    np.testing.assert_array_equal(updates["norm"].scale, np.full(CHANNELS, 0.5))
    np.testing.assert_array_equal(updates["norm"].bias, np.zeros(CHANNELS))
