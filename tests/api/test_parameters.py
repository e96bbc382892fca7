"""How layers hold their parameters: initial values, parameter types, frozen parameters."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle

import numpy as np
import pytest

from groupnorm import GroupNorm
from groupnorm.errors import ArgumentTypeError
from groupnorm.parameters import ObjectStore, register_param_type
from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, ROWS, assert_close, assert_gradient

CHANNELS, GROUPS = 8, 4
BACKENDS = ["numpy", *(pytest.param(n, marks=pytest.mark.needs(n)) for n in ("jax", "torch"))]
needs_jax, needs_torch = pytest.mark.needs("jax"), pytest.mark.needs("torch")


def make(backend, **options):
    return GroupNorm(CHANNELS, num_groups=GROUPS, backend=backend, **options)


def host(layer) -> list[np.ndarray]:
    layer = layer.to_backend("numpy")
    return [layer.scale, layer.bias]


# Initial values -------------------------------------------------------------------------------


@pytest.mark.parametrize("library", BACKENDS)
def test_numbers_and_arrays(library, rng):
    values = rng.normal(size=CHANNELS).astype(np.float32)
    for number in (3, 3.0, np.float32(3), np.int64(3)):
        scale, bias = host(make(library, scale_init=number, bias_init=values))
        np.testing.assert_array_equal(scale, np.full(CHANNELS, 3, np.float32))
        np.testing.assert_array_equal(bias, values)
    layer = make(library, scale_init=values, param_dtype="float16")
    assert host(layer)[0].dtype == np.float16
    np.testing.assert_array_equal(host(layer)[0], values.astype(np.float16))
    before = values.copy()
    values[:] = 0  # a copy was made
    np.testing.assert_array_equal(host(make(library, bias_init=before))[1], before)
    assert host(layer)[0].any()


@pytest.mark.parametrize("source", BACKENDS)
@pytest.mark.parametrize("library", BACKENDS)
def test_arrays_of_another_library(source, library, rng):
    values = rng.normal(size=CHANNELS).astype(np.float32)
    given = ROWS[source].asarray(values)
    if source == "torch":
        given.requires_grad_()
    np.testing.assert_array_equal(host(make(library, scale_init=given))[0], values)


@needs_jax
@pytest.mark.parametrize("library", BACKENDS)
def test_two_parameters_get_two_keys(library):
    jax = importlib.import_module("jax")
    init = jax.nn.initializers.normal()
    scale, bias = host(make(library, scale_init=init, bias_init=init))
    assert not np.intersect1d(scale, bias).size
    again = make(library, scale_init=init, bias_init=init, key=jax.random.key(0))
    np.testing.assert_array_equal(host(again)[0], scale)  # the default
    for key in (jax.random.key(1), jax.random.PRNGKey(1)):
        other = host(make(library, scale_init=init, bias_init=init, key=key))
        assert not np.intersect1d(other, [scale, bias]).size
        np.testing.assert_array_equal(
            other[0], init(jax.random.split(jax.random.key(1))[0], (CHANNELS,), np.float32)
        )
    with pytest.raises(ArgumentTypeError, match="key="):
        make(library, scale_init=init, key=np.zeros(3))


@needs_jax
@pytest.mark.needs("flax")
def test_streams_of_keys():
    jax, nnx = importlib.import_module("jax"), importlib.import_module("flax.nnx")
    init = nnx.initializers.normal()
    layer = make("jax", scale_init=init, bias_init=init, rngs=nnx.Rngs(7))
    peer = nnx.GroupNorm(CHANNELS, GROUPS, scale_init=init, bias_init=init, rngs=nnx.Rngs(7))
    np.testing.assert_array_equal(layer.scale, peer.scale[...])
    np.testing.assert_array_equal(layer.bias, peer.bias[...])
    with pytest.raises(ArgumentTypeError, match="both"):
        make("jax", scale_init=init, rngs=nnx.Rngs(0), key=jax.random.key(0))


@needs_torch
def test_initializers_of_torch_and_their_reset():
    torch = importlib.import_module("torch")
    layer = make("torch", scale_init=torch.nn.init.uniform_, bias_init=0.5)
    with torch.no_grad():
        layer.weight.fill_(-1)
        layer.bias.fill_(-1)
    layer.reset_parameters()
    assert ((layer.weight >= 0) & (layer.weight < 1)).all()
    assert (layer.bias == 0.5).all()


@pytest.mark.parametrize("library", BACKENDS)
def test_initializers_are_no_part_of_a_layer(library):
    layers = [
        make(library, scale_init=i)
        for i in (1.0, np.ones(CHANNELS), lambda shape: 1 + 0 * np.ones(shape))
    ]
    for layer in layers:
        assert layer._config == layers[0]._config
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other._config == layer._config
            np.testing.assert_array_equal(host(other)[0], np.ones(CHANNELS))
    if library != "torch":  # whose modules initialize themselves again
        assert len({pickle.dumps(layer) for layer in layers}) == 1


# Parameter types -------------------------------------------------------------------------------


class Boxed:
    """A parameter without the usual attributes."""

    def __init__(self, content, tag=None):
        self.content, self.tag = content, tag


class BoxedStore(ObjectStore):
    def read(self, held, name):
        return held[name] and held[name].content

    def write(self, held, name, value):
        return {**held, name: Boxed(value)}


@pytest.mark.parametrize("library", ["numpy", pytest.param("jax", marks=needs_jax)])
def test_a_registered_class(library, rng):
    class Special(Boxed):
        """Registered with the class that it derives from."""

    register_param_type(Boxed, BoxedStore(Boxed))
    for param_type in (Boxed, Special):
        layer = make(library, param_type=param_type, use_bias=False, scale_init=2)
        values = ROWS[library].asarray(rng.normal(size=CHANNELS).astype(np.float32))
        np.testing.assert_array_equal(np.asarray(layer.scale), np.full(CHANNELS, 2))
        layer.scale = values
        np.testing.assert_array_equal(np.asarray(layer.scale), np.asarray(values))
        x = rng.normal(size=(2, 5, CHANNELS)).astype(np.float32)
        want = oracle.group_norm(x, np.asarray(values), num_groups=GROUPS)
        assert_close(np.asarray(layer(ROWS[library].asarray(x))), want, tolerance=2 * CONTRACT)
        assert layer.bias is None


@pytest.mark.parametrize(
    ("param_type", "store", "match"),
    [(3, BoxedStore(Boxed), "param_type=3"), (Boxed, object(), "no method 'create'")],
)
def test_wrong_registrations(param_type, store, match):
    with pytest.raises(ArgumentTypeError, match=match):
        register_param_type(param_type, store)


@needs_torch
def test_a_parameter_type_that_is_no_torch_parameter():
    """Such a module would neither train nor save it."""
    with pytest.raises(ArgumentTypeError, match=r"torch.nn.Parameter only.*trainable=False"):
        make("torch", param_type=lambda value: value)


@needs_jax
@pytest.mark.needs("flax")
def test_sharding_metadata_of_flax():
    jax, nnx = importlib.import_module("jax"), importlib.import_module("flax.nnx")
    sharding = ("channels",)
    init = nnx.with_partitioning(nnx.initializers.ones, sharding)
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1,), sharding, axis_types=auto)):
        for param_type in (nnx.Param, functools.partial(nnx.Param, tag="norm")):
            layer = make("jax", scale_init=init, param_type=param_type)
            assert layer.to_backend("jax")._held["scale"].out_sharding == sharding
            scale, bias = layer._held["scale"], layer._held["bias"]
            assert type(scale) is type(bias) is nnx.Param
            assert scale.out_sharding == sharding
            assert "out_sharding" not in bias.get_metadata()
            assert ("tag" in bias.get_metadata()) == (param_type is not nnx.Param)
    with pytest.raises(ArgumentTypeError, match=r"metadata.*param_type"):
        make("jax", scale_init=init)


@needs_jax
@pytest.mark.needs("brainstate")
def test_one_state_of_all_parameters(rng):
    """As brainstate's normalizations keep them, which tools of its users expect."""
    brainstate = importlib.import_module("brainstate")
    state_type = type(brainstate.nn.GroupNorm((CHANNELS,), num_groups=GROUPS).weight)
    layer = make("jax", param_type=state_type)
    state = layer._held["weight"]
    assert type(state) is state_type
    assert set(state.value) == {"scale", "bias"}
    value = ROWS["jax"].asarray(rng.normal(size=CHANNELS).astype(np.float32))
    layer.scale = value
    assert layer._held["weight"] is state
    np.testing.assert_array_equal(state.value["scale"], value)
    x = ROWS["jax"].asarray(rng.normal(size=(2, 5, CHANNELS)).astype(np.float32))
    want = oracle.group_norm(np.asarray(x), np.asarray(value), num_groups=GROUPS)
    assert_close(np.asarray(brainstate.transform.jit(layer)(x)), want, tolerance=2 * CONTRACT)


# Frozen parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("library", BACKENDS)
def test_frozen_parameters(library, rng):
    row = ROWS[library]
    values = rng.normal(size=(2, CHANNELS)).astype(np.float32)
    layer = make(library, trainable=False, scale_init=values[0], bias_init=values[1])
    assert layer.trainable is False
    assert "trainable=False" in repr(layer)
    assert layer.to_backend("numpy").trainable is False
    x, dy = rng.normal(size=(2, 3, 5, CHANNELS)).astype(np.float32)
    y, pullback = layer.vjp(row.asarray(x))
    gradients = pullback(row.asarray(dy))
    assert gradients.scale is gradients.bias is None
    want = oracle.group_norm_gradients(x, dy, *values, num_groups=GROUPS)
    assert_gradient(row.to_numpy(gradients.x), want.x, rtol=GRADIENT)
    assert_close(
        row.to_numpy(y), oracle.group_norm(x, *values, num_groups=GROUPS), tolerance=2 * CONTRACT
    )


@needs_torch
def test_parameters_that_are_trained_again(rng):
    """By the framework's own means, for every kind of input."""
    torch = importlib.import_module("torch")
    layer = make("torch", trainable=False).requires_grad_(True)
    x = torch.nn.Parameter(torch.from_numpy(rng.normal(size=(2, CHANNELS)).astype(np.float32)))
    layer(x).pow(3).sum().backward()
    assert layer.weight.grad.any()


@pytest.mark.needs("mlx")
def test_parameters_that_mlx_trains_again(rng):
    mx, nn = importlib.import_module("mlx.core"), importlib.import_module("mlx.nn")
    layer = make("mlx", trainable=False)
    assert not layer.trainable
    layer.unfreeze()
    x = mx.array(rng.normal(size=(2, 5, CHANNELS)).astype(np.float32))
    gradient = nn.value_and_grad(layer, lambda x: (layer(x) ** 3).sum())(x)[1]
    assert np.asarray(gradient["weight"]).any()


@pytest.mark.parametrize("library", ["numpy", pytest.param("jax", marks=needs_jax)])
def test_a_type_that_returns_the_array(library):
    layer = make(library, param_type=lambda value: value)
    layer.scale = ROWS[library].asarray(np.full(CHANNELS, 3, np.float32))
    np.testing.assert_array_equal(host(layer)[0], np.full(CHANNELS, 3))


@needs_torch
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_moves_to_torch(dtype):
    pytest.importorskip("ml_dtypes", reason="NumPy's float8 comes from ml_dtypes")
    layer = make("numpy", param_dtype=dtype, scale_init=1.5)
    moved = layer.to_backend("torch")
    assert moved.param_dtype == dtype
    assert host(moved)[0].tobytes() == layer.scale.tobytes()


@needs_torch
def test_frozen_parameters_of_torch(rng):
    layer = make("numpy", trainable=False).to_backend("torch")
    assert [p.requires_grad for p in layer.parameters()] == [False, False]
    layer.weight.requires_grad_()
    assert layer.trainable
    assert layer.to_backend("numpy").trainable
    layer.requires_grad_(False)
    assert not layer.to_backend("numpy").trainable


@needs_jax
def test_frozen_parameters_of_jax(rng):
    jax = importlib.import_module("jax")
    layer, x = make("jax", trainable=False), rng.normal(size=(2, 5, CHANNELS))
    x = jax.numpy.asarray(x, "float32")
    gradient = jax.grad(lambda layer: (layer(x) ** 3).sum())(layer)
    assert not gradient.scale.any()
    assert not gradient.bias.any()


@needs_jax
@pytest.mark.needs("flax", "brainstate")
def test_optimizers_leave_out_frozen_parameters():
    nnx, brainstate = importlib.import_module("flax.nnx"), importlib.import_module("brainstate")
    frozen = make("jax", trainable=False, param_type=nnx.Param)
    assert isinstance(frozen._held["scale"], nnx.Variable)
    assert not isinstance(frozen._held["scale"], nnx.Param)
    frozen = make("jax", trainable=False, param_type=brainstate.ParamState)
    assert not isinstance(frozen._held["scale"], brainstate.ParamState)


@needs_jax
@needs_torch
@pytest.mark.needs("flax")
def test_conversion_keeps_what_means_something():
    torch, nnx = importlib.import_module("torch"), importlib.import_module("flax.nnx")
    module = make("torch").eval()
    module.bias.requires_grad_(False)
    other = module.to_backend("torch")
    assert not other.training
    assert [p.requires_grad for p in other.parameters()] == [True, False]
    layer = make("jax", param_type=nnx.Param)
    assert layer.to_backend("jax").param_type is nnx.Param
    assert layer.to_backend("jax", param_type=None).param_type is None
    assert isinstance(layer.to_backend("torch"), torch.nn.Module)
    assert layer.to_backend("numpy").param_type is None
