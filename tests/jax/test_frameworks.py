"""The JAX layer inside equinox and flax nnx modules, without wrapper classes."""

from __future__ import annotations

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from groupnorm import GroupNorm
from groupnorm.errors import ArgumentTypeError
from groupnorm.testing import oracle
from tests.jax.test_layer import CHANNELS, GROUPS, array, assert_equals_oracle, check_conversion
from tests.jax.test_layer import make as make_layer
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient


class EquinoxModel(eqx.Module):
    norm: GroupNorm
    linear: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(self.linear)(self.norm(x[None])[0])


def equinox_model(rng) -> EquinoxModel:
    return EquinoxModel(make_layer(rng), eqx.nn.Linear(CHANNELS, 3, key=jax.random.key(0)))


def test_equinox_filter_jit_and_filter_grad(rng):
    model, x, dy = equinox_model(rng), array(rng, 5, CHANNELS), array(rng, 5, 3)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model):
        return (model(x) * dy).sum()

    grads = gradient(model)
    inner = np.asarray(dy, np.float64) @ np.asarray(model.linear.weight, np.float64)
    parameters = (np.asarray(p) for p in (model.norm.scale, model.norm.bias))
    want = oracle.group_norm_gradients(
        np.asarray(x)[None], inner[None], *parameters, num_groups=GROUPS
    )
    assert_gradient(np.asarray(grads.norm.scale), want.scale, rtol=2 * GRADIENT)
    assert_gradient(np.asarray(grads.norm.bias), want.bias, rtol=2 * GRADIENT)


def test_equinox_tree_at_replaces_a_parameter(rng):
    model, x = equinox_model(rng), array(rng, 5, CHANNELS)
    other = eqx.tree_at(lambda model: model.norm.scale, model, 2 * model.norm.scale)
    assert_equals_oracle(other.norm, x, other.norm(x))
    np.testing.assert_array_equal(other.norm.scale, 2 * model.norm.scale)
    np.testing.assert_array_equal(other.norm.bias, model.norm.bias)


def test_equinox_partition_and_serialise(rng):
    model, other = equinox_model(rng), equinox_model(rng)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    assert len(jax.tree.leaves(arrays)) == 4
    np.testing.assert_array_equal(eqx.combine(arrays, rest).norm.scale, model.norm.scale)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    read = eqx.tree_deserialise_leaves(file, other)
    np.testing.assert_array_equal(read.norm.scale, model.norm.scale)
    assert not np.array_equal(other.norm.scale, model.norm.scale)


class NnxModel(nnx.Module):
    def __init__(self, rng, rngs):
        self.linear = nnx.Linear(3, CHANNELS, rngs=rngs)
        self.norm = nnx_layer(rng)

    def __call__(self, x):
        return self.norm(self.linear(x))


def nnx_layer(rng) -> GroupNorm:
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="jax", param_type=nnx.Param)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), layer)


def parameter_values(layer) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(layer)]


@pytest.fixture
def nnx_rng(rng):
    """The one line of set-up that nnx wants: layers hold data."""
    nnx.register_data_type(type(GroupNorm(CHANNELS, num_groups=GROUPS, backend="jax")))
    return rng


def test_nnx_finds_the_parameters_and_trains_them(nnx_rng):
    model = NnxModel(nnx_rng, nnx.Rngs(0))
    assert set(nnx.state(model, nnx.Param)["norm"]) == {"scale", "bias"}
    x, target = array(nnx_rng, 6, 5, 3), array(nnx_rng, 6, 5, CHANNELS)
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: ((model(x) - target) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    before = parameter_values(model.norm)
    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    for old, new in zip(before, parameter_values(model.norm), strict=True):
        assert (old != new).all()


def test_nnx_gradients_in_sequential(nnx_rng):
    layer, x = nnx_layer(nnx_rng), array(nnx_rng, 2, 5, CHANNELS)
    dy = array(nnx_rng, *x.shape)
    model = nnx.Sequential(layer, jnp.tanh, lambda x: x)
    scale, bias = parameter_values(layer)
    normalized = oracle.group_norm(np.asarray(x), scale, bias, num_groups=GROUPS)
    np.testing.assert_allclose(model(x), np.tanh(normalized), atol=1e-5)
    grads = nnx.grad(lambda model, x: (model(x) * dy).sum())(model, x)
    cotangent = (1 - np.tanh(normalized) ** 2) * np.asarray(dy, np.float64)
    want = oracle.group_norm_gradients(np.asarray(x), cotangent, scale, bias, num_groups=GROUPS)
    found = grads["layers"][0]
    assert_gradient(np.asarray(found["scale"][...]), want.scale, rtol=4 * GRADIENT)
    assert_gradient(np.asarray(found["bias"][...]), want.bias, rtol=4 * GRADIENT)


def test_nnx_split_merge_and_clone(nnx_rng):
    model, x = NnxModel(nnx_rng, nnx.Rngs(0)), array(nnx_rng, 2, 5, 3)
    definition, state = nnx.split(model)
    again = nnx.merge(definition, jax.tree.map(lambda a: a, state))
    np.testing.assert_array_equal(again(x), model(x))
    other = nnx.clone(model)
    other.norm.scale = 2 * other.norm.scale
    assert isinstance(nnx.state(other)["norm"]["scale"], nnx.Param)
    assert not np.array_equal(other(x), model(x))


def test_nnx_vmap_over_the_layer(nnx_rng):
    layer, x = nnx_layer(nnx_rng), array(nnx_rng, 3, 2, 5, CHANNELS)
    got = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, x)
    for one, y in zip(x, got, strict=True):
        want = oracle.group_norm(np.asarray(one), *parameter_values(layer), num_groups=GROUPS)
        assert_close(np.asarray(y), want, tolerance=2 * CONTRACT)


def test_converted_to_another_backend_and_back(rng):
    check_conversion(nnx.Param, rng)


def test_param_type_that_is_no_class():
    with pytest.raises(ArgumentTypeError, match="param_type"):
        GroupNorm(CHANNELS, num_groups=GROUPS, backend="jax", param_type=3)


@pytest.mark.parametrize("compiler", [lambda f: f, eqx.filter_jit], ids=["eager", "jit"])
def test_equinox_sequential_passes_a_key(compiler, rng):
    layer, x = make_layer(rng), array(rng, 2, 5, CHANNELS)
    model = eqx.nn.Sequential([eqx.nn.Lambda(lambda x: 2 * x), layer, eqx.nn.Lambda(jnp.tanh)])
    y = compiler(model)(x, key=jax.random.key(0))
    parameters = (np.asarray(p) for p in (layer.scale, layer.bias))
    want = np.tanh(oracle.group_norm(2 * np.asarray(x), *parameters, num_groups=GROUPS))
    assert_close(np.asarray(y), want, tolerance=2 * CONTRACT)


def test_equinox_filter_vmap_over_samples_and_layers(rng):
    layers, x = [make_layer(rng) for _ in range(3)], array(rng, 3, 5, CHANNELS)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    got = eqx.filter_vmap(lambda layer, x: layer(x[None], key=None)[0])(stacked, x)
    for layer, one, y in zip(layers, x, got, strict=True):
        parameters = (np.asarray(p) for p in (layer.scale, layer.bias))
        want = oracle.group_norm(np.asarray(one)[None], *parameters, num_groups=GROUPS)[0]
        assert_close(np.asarray(y), want, tolerance=2 * CONTRACT)
