"""MLX: the layer as a module, MLX's transformations, dtypes and devices, errors."""

from __future__ import annotations

import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest

from groupnorm import GroupNorm, available_backends, group_norm, group_norm_vjp
from groupnorm.dispatch import adapter_named, adapter_of
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, AxisNameError
from groupnorm.testing import oracle
from tests.portable.test_activation import reference, reference_gradients
from tests.rows import (
    CONTRACT,
    CONTRACT_64,
    GRADIENT,
    GRADIENT_FAR,
    ROWS,
    Differentiated,
    assert_close,
    assert_gradient,
    assert_gradients,
)

ROW = ROWS["mlx"]
SHAPE, GROUPS = (3, 7, 5, 12), 4


def drawn(rng, offset=0.0, dtype=np.float32):
    x = (offset + rng.normal(size=SHAPE)).astype(dtype)
    return x, rng.normal(size=SHAPE).astype(dtype), *rng.normal(size=(2, 12)).astype(dtype)


def trained_layer(scale, bias, **options):
    layer = GroupNorm(12, num_groups=GROUPS, backend="mlx", **options)
    layer.scale, layer.bias = mx.array(scale), mx.array(bias)
    return layer


# The module ---------------------------------------------------------------------------------------


def test_the_layer_is_a_module_of_its_parameters():
    layer = GroupNorm(12, num_groups=GROUPS, backend="mlx")
    assert isinstance(layer, nn.Module)
    assert isinstance(layer, GroupNorm)
    assert set(layer.parameters()) == set(nn.GroupNorm(GROUPS, 12).parameters())
    assert layer.parameters()["weight"] is layer.scale is layer.weight
    assert layer.bias.shape == layer.scale.shape == (12,)
    assert repr(layer) == "GroupNorm((12,), num_groups=4, backend='mlx')"
    plain = GroupNorm(12, num_groups=4, backend="mlx", use_scale=False, use_bias=False)
    assert plain.parameters() == {}
    assert plain.scale is plain.bias is None


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_value_and_grad_of_a_model(offset, rng):
    x, dy, scale, bias = drawn(rng, offset)
    model = nn.Sequential(trained_layer(scale, bias))
    cotangent = mx.array(dy)
    value, found = nn.value_and_grad(model, lambda x: mx.sum(model(x) * cotangent))(mx.array(x))
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=GROUPS)
    y = oracle.group_norm(x, scale, bias, num_groups=GROUPS)
    np.testing.assert_allclose(float(value), (y * dy).sum(), rtol=1e-4)
    [found] = found["layers"]
    rtol = GRADIENT_FAR if offset else GRADIENT
    for name, gradient in (("weight", want.scale), ("bias", want.bias)):
        assert_gradient(np.array(found[name]), gradient, rtol=rtol)


def test_an_optimizer_trains_the_layer_as_part_and_as_whole(rng):
    x, dy, scale, bias = drawn(rng)
    layer = trained_layer(scale, bias)
    for model in (layer, nn.Sequential(nn.Linear(12, 12), layer)):
        loss = nn.value_and_grad(model, lambda x, model=model: mx.mean((model(x) - dy) ** 2))
        optimizer = mlx.optimizers.SGD(learning_rate=0.1)
        losses = []
        for _ in range(20):
            value, gradients = loss(mx.array(x))
            optimizer.update(model, gradients)
            losses.append(float(value))
        assert losses[-1] < losses[0]
    assert np.abs(np.array(layer.scale) - scale).max() > 0.01


def test_a_compiled_training_step(rng):
    x, dy, scale, bias = drawn(rng)
    model = nn.Sequential(trained_layer(scale, bias), nn.Linear(12, 12))
    optimizer = mlx.optimizers.Adam(learning_rate=0.01)
    state = [model.state, optimizer.state]
    loss = nn.value_and_grad(model, lambda x, dy: mx.mean((model(x) - dy) ** 2))

    def step(x, dy):
        value, gradients = loss(x, dy)
        optimizer.update(model, gradients)
        return value

    compiled = mx.compile(step, inputs=state, outputs=state)
    losses = [float(compiled(mx.array(x), mx.array(dy))) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert np.abs(np.array(model.layers[0].scale) - scale).max() > 0.01


def test_freezing():
    layer = GroupNorm(12, num_groups=GROUPS, backend="mlx")
    layer.freeze(keys="bias")
    assert set(layer.trainable_parameters()) == {"weight"}
    layer.unfreeze()
    assert set(layer.trainable_parameters()) == {"weight", "bias"}


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_weights_of_mlx_layers_are_loaded(suffix, rng, tmp_path):
    _, _, scale, bias = drawn(rng)
    theirs = nn.GroupNorm(GROUPS, 12)
    theirs.weight, theirs.bias = mx.array(scale), mx.array(bias)
    file = str(tmp_path / f"weights.{suffix}")
    theirs.save_weights(file)
    layer = GroupNorm(12, num_groups=GROUPS, backend="mlx")
    layer.load_weights(file)
    np.testing.assert_array_equal(np.array(layer.scale), scale)
    np.testing.assert_array_equal(np.array(layer.bias), bias)
    layer.save_weights(file)
    theirs.load_weights(file)


def test_update_is_a_call_with_an_array_and_replaces_parameters_with_a_dict(rng):
    x, _, scale, bias = drawn(rng)
    layer = GroupNorm(12, num_groups=GROUPS, backend="mlx")
    assert layer.update({"weight": mx.array(scale), "bias": mx.array(bias)}) is layer
    mask = np.arange(7)[:, None, None] < 4
    want = oracle.group_norm(x, scale, bias, num_groups=GROUPS, mask=mask)
    assert_close(np.array(layer.update(mx.array(x), mask)), want, tolerance=3 * CONTRACT)
    with pytest.raises(ValueError, match="Module does not have parameter"):
        layer.update({"gamma": mx.array(scale)})


def test_assigned_parameters_are_checked():
    layer = GroupNorm(12, num_groups=GROUPS, backend="mlx", use_bias=False)
    for name in ("scale", "weight"):
        setattr(layer, name, 2 * mx.ones(12))
        assert float(layer.scale[0]) == 2
        with pytest.raises(ArgumentValueError, match=r"scale has shape \(3,\)"):
            setattr(layer, name, mx.ones(3))
        with pytest.raises(ArgumentTypeError, match=r"ndarray.*MLX arrays"):
            setattr(layer, name, np.ones(12))
    with pytest.raises(ArgumentValueError, match="bias cannot be set"):
        layer.bias = mx.ones(12)
    assert set(layer.parameters()) == {"weight"}


def test_a_subclass_may_have_modules_of_its_own():
    from groupnorm.backends.mlx import MlxGroupNorm

    class Projected(MlxGroupNorm):
        def __call__(self, x, mask=None):
            return self.projection(super().__call__(x, mask))

    layer = Projected(12, num_groups=GROUPS)
    layer.projection = nn.Linear(12, 3)
    assert layer(mx.ones((2, 12))).shape == (2, 3)
    assert set(layer.parameters()) == {"weight", "bias", "projection"}


@pytest.mark.parametrize(
    "remade", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]
)
def test_copies_compute_the_same(remade, rng):
    x, _, scale, bias = drawn(rng)
    layer = trained_layer(scale, bias)
    other = remade(layer)
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    np.testing.assert_array_equal(np.array(other(mx.array(x))), np.array(layer(mx.array(x))))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_layers_move_to_mlx_and_back_exactly(dtype, rng):
    layer = GroupNorm((4, ..., 6), (0, -1), 3, scale_init=lambda shape: rng.normal(size=shape))
    there = GroupNorm(
        (4, ..., 6), (0, -1), 3, backend="mlx", param_dtype=dtype,
        scale_init=lambda shape: np.asarray(layer.scale),
    )  # fmt: skip
    assert there.scale.shape == (4, 6)
    assert str(there.scale.dtype).endswith(dtype)
    back = there.to_backend("numpy")
    assert back.scale.dtype.name == dtype
    again = back.to_backend("mlx")
    assert mx.array_equal(again.scale, there.scale)
    assert again.scale.dtype == there.scale.dtype


def test_a_numpy_layer_takes_arrays_of_mlx(rng):
    x, _, scale, bias = drawn(rng, 1e4)
    layer = GroupNorm(12, num_groups=GROUPS)
    layer.scale, layer.bias = scale, bias
    y = layer(mx.array(x))
    assert isinstance(y, mx.array)
    assert y.dtype == mx.float32
    assert_close(
        np.array(y), oracle.group_norm(x, scale, bias, num_groups=GROUPS), tolerance=3 * CONTRACT
    )


# Transformations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("offset", "rtol"), [(0.0, GRADIENT), (1e3, GRADIENT_FAR)])
def test_gradients_by_mlx(offset, rtol, masked, compiled, rng):
    x, dy, scale, bias = drawn(rng, offset)
    mask = rng.random((3, 7, 5, 1)) < 0.7 if masked else None
    given = np.where(mask, x, np.float32("nan")) if masked else x

    def pulled(dy, x, scale, bias):
        on_mlx = None if mask is None else mx.array(mask)
        [y], found = mx.vjp(
            lambda *a: group_norm(*a, num_groups=GROUPS, mask=on_mlx), [x, scale, bias], [dy]
        )
        return y, *found

    function = mx.compile(pulled) if compiled else pulled
    found = function(*map(mx.array, (dy, given, scale, bias)))
    assert all(isinstance(a, mx.array) and a.dtype == mx.float32 for a in found)
    want = oracle.group_norm_gradients(given, dy, scale, bias, num_groups=GROUPS, mask=mask)
    assert_gradients(Differentiated(*map(np.array, found)), want, rtol=rtol)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4, 1e5])
def test_compiled_results(offset, fast, rng):
    x, _, scale, bias = drawn(rng, offset)
    layer = trained_layer(scale, bias, use_fast_variance=fast)
    function = mx.compile(layer)
    for batch in (3, 2):  # compiled again
        want = oracle.group_norm(x[:batch], scale, bias, num_groups=GROUPS)
        y = function(mx.array(x[:batch]))
        assert_close(np.array(y), want, tolerance=3 * CONTRACT)


@pytest.mark.parametrize("shape", [SHAPE, (2, 63, 12), (4, 12)])
def test_compiling_for_any_shape_raises(shape):
    """Otherwise MLX would use the sizes of the first call, or crash."""
    layer = GroupNorm(12, num_groups=GROUPS, backend="mlx")
    function = mx.compile(lambda x: layer(x), shapeless=True)
    with pytest.raises(ValueError, match="cannot infer output shapes"):
        mx.eval(function(mx.ones(shape)))


@pytest.mark.parametrize("masked", [False, True])
def test_vmap(masked, rng):
    x, _, scale, bias = drawn(rng, 10.0)
    mask = rng.random((3, 7, 5, 1)) < 0.7 if masked else None
    given = None if mask is None else mx.array(mask)

    def function(x, scale):
        return group_norm(x, scale, mx.array(bias), num_groups=GROUPS, mask=given)

    xs, scales = np.stack([x, x + 1, 2 * x]), np.stack([scale, -scale, 2 * scale])
    y = mx.vmap(function)(mx.array(xs), mx.array(scales))
    for one, own, got in zip(xs, scales, np.array(y), strict=True):
        want = oracle.group_norm(one, own, bias, num_groups=GROUPS, mask=mask)
        assert_close(got, want, tolerance=6 * CONTRACT)


def test_second_derivatives(rng):
    x, dy, *_ = drawn(rng)
    x, dy, along = (mx.array(a) for a in (x, dy, rng.normal(size=SHAPE).astype(np.float32)))

    def directional(x):
        gradient = mx.grad(lambda x: mx.sum(group_norm(x, num_groups=GROUPS) * dy))(x)
        return mx.sum(gradient * along)

    second = mx.grad(directional)(x)
    step = 1e-2
    difference = (directional(x + step * along) - directional(x - step * along)) / (2 * step)
    np.testing.assert_allclose(float(mx.sum(second * along)), float(difference), rtol=1e-2)


def test_a_pullback_ignores_later_writes(rng):
    x, dy, scale, bias = drawn(rng)
    arrays = [mx.array(a) for a in (x, scale, bias)]
    _, pullback = group_norm_vjp(*arrays, num_groups=GROUPS)
    for a in arrays:
        a[...] = float("nan")
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=GROUPS)
    found = Differentiated(x, *map(np.array, pullback(mx.array(dy))))
    assert_gradients(found, want, rtol=GRADIENT)


def test_arguments_are_not_written_to(rng):
    x, dy, scale, bias = drawn(rng)
    given = [mx.array(a) for a in (x, scale, bias, dy)]
    _, pullback = group_norm_vjp(*given[:3], num_groups=GROUPS, activation="silu")
    mx.eval(*pullback(given[3]))
    for a, host in zip(given, (x, scale, bias, dy), strict=True):
        np.testing.assert_array_equal(np.array(a), host)


# Dtypes and devices -------------------------------------------------------------------------------


@pytest.mark.skipif("float64" not in ROW.dtypes, reason="MLX has float64 on CPUs only")
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_float64(offset, activation, rng):
    """MLX's exp is accurate to float32 only."""
    x, dy, scale, bias = drawn(rng, offset, np.float64)
    arrays = [mx.array(a, dtype=mx.float64) for a in (x, scale, bias)]
    y, pullback = group_norm_vjp(*arrays, num_groups=GROUPS, activation=activation)
    found = Differentiated(*map(np.array, (y, *pullback(mx.array(dy, dtype=mx.float64)))))
    assert {a.dtype for a in found} == {np.dtype(np.float64)}
    near = x - offset  # exact, and the reference itself is of float64
    want = reference(near, scale, bias, activation, num_groups=GROUPS)
    assert_close(found.y, want, tolerance=3 * CONTRACT_64)
    want = reference_gradients(near, dy, scale, bias, activation, num_groups=GROUPS)
    assert_gradients(found, want, rtol=1e-14)


@pytest.mark.skipif("float64" not in ROW.dtypes, reason="MLX has float64 on CPUs only")
def test_parameters_in_float64_are_kept(rng):
    layer = GroupNorm(12, num_groups=GROUPS, param_dtype="float64")
    layer.scale = rng.normal(size=12)
    there = layer.to_backend("mlx")
    assert there.scale.dtype == mx.float64
    np.testing.assert_array_equal(np.array(there.scale), layer.scale)


def test_a_device_without_float64(monkeypatch):
    adapter = adapter_named("mlx")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert adapter.devices() == ("gpu",)
    assert "float64" not in ROW.dtypes
    with pytest.raises(ArgumentTypeError, match=r"dtype='float64'.* on CPUs only.*set_default"):
        group_norm(mx.ones((2, 8)), num_groups=2, dtype="float64")


def test_devices():
    own = mx.default_device()
    [info] = [b for b in available_backends() if b.name == "mlx"]
    assert info.devices == (own.type.name,)
    assert info.version == mx.__version__
    for device in (None, own, own.type, own.type.name):
        GroupNorm(12, num_groups=GROUPS, backend="mlx", device=device)
    for device in ("cuda:0", 3, mx.gpu if own.type == mx.cpu else mx.cpu):
        with pytest.raises(
            ArgumentValueError, match=r"device=.*MLX computes on.*set_default_device"
        ):
            GroupNorm(12, num_groups=GROUPS, backend="mlx", device=device)


@pytest.mark.parametrize("name", ["complex128", "float8_e4m3fn"])
def test_dtypes_that_mlx_lacks(name):
    with pytest.raises(ArgumentTypeError, match=f"dtype='{name}' is not a dtype of MLX"):
        group_norm(mx.ones((2, 8)), num_groups=2, dtype=name)


def test_host_parameters_of_a_dtype_that_mlx_lacks():
    with pytest.raises(ArgumentTypeError, match="scale has dtype complex128"):
        group_norm(mx.ones((2, 8)), np.ones(8, np.complex128), num_groups=2)


# Errors -------------------------------------------------------------------------------------------


def test_arrays_of_two_libraries():
    x = mx.ones((2, 12))
    assert adapter_of(x) is adapter_named("mlx")
    layer = GroupNorm(12, num_groups=GROUPS, backend="mlx")
    with pytest.raises(
        ArgumentTypeError, match=r"x is of NumPy arrays .* MLX arrays.*to_backend\('numpy'\)"
    ):
        layer(np.ones((2, 12), np.float32))
    with pytest.raises(ArgumentTypeError, match=r"mask=.*not an array"):
        group_norm(x, num_groups=GROUPS, mask=object())


@pytest.mark.needs("jax", "torch")
@pytest.mark.parametrize("other", ["jax", "torch"])
def test_arrays_of_mlx_in_layers_of_other_libraries(other):
    layer = GroupNorm(12, num_groups=GROUPS, backend=other)
    with pytest.raises(ArgumentTypeError, match=r"x is of MLX arrays .*to_backend\('mlx'\)"):
        layer(mx.ones((2, 12)))
    with pytest.raises(ArgumentTypeError, match="x is of MLX arrays and scale of"):
        group_norm(
            mx.ones((2, 12)), ROWS[other].asarray(np.ones(12, np.float32)), num_groups=GROUPS
        )
    with pytest.raises(ArgumentTypeError, match="and scale of MLX arrays"):
        group_norm(
            ROWS[other].asarray(np.ones((2, 12), np.float32)), mx.ones(12), num_groups=GROUPS
        )


def test_parameter_types_are_refused():
    with pytest.raises(
        ArgumentTypeError, match=r"param_type=.*mlx.nn.Module.*Leave param_type out"
    ):
        GroupNorm(12, num_groups=GROUPS, backend="mlx", param_type=Wrapped)


class Wrapped:
    def __init__(self, value):
        self.value = value


def test_there_are_no_replicas_and_no_kernels():
    x = mx.ones((2, 12))
    with pytest.raises(AxisNameError, match="MLX has no replicas"):
        group_norm(x, num_groups=GROUPS, axis_name=object())
    with pytest.raises(ArgumentValueError, match="there are no kernels for MLX arrays"):
        group_norm(x, num_groups=GROUPS, implementation="fused")
