"""The NumPy layer: a plain object that accepts every library's arrays."""

from __future__ import annotations

import copy
import importlib
import pickle

import numpy as np
import pytest

from groupnorm import GroupNorm, group_norm_vjp
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, GroupNormError
from groupnorm.testing import oracle
from tests.rows import (
    CONTRACT,
    CONTRACT_64,
    GRADIENT,
    assert_close,
    assert_gradient,
    check_array,
)

CHANNELS, GROUPS = 8, 4


def make(rng, dtype=np.float32, **keywords) -> GroupNorm:
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, param_dtype=dtype, **keywords)
    for name in ("scale", "bias"):
        if getattr(layer, name) is not None:
            setattr(layer, name, rng.normal(size=CHANNELS).astype(layer.scale.dtype))
    return layer


def expected(layer, x, **keywords) -> np.ndarray:
    return oracle.group_norm(x, layer.scale, layer.bias, num_groups=GROUPS, **keywords)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("fast", [True, False])
def test_vjp(fast, masked, rng):
    layer = make(rng, use_fast_variance=fast)
    x, dy = (rng.normal(size=(3, 6, CHANNELS)).astype(np.float32) for _ in range(2))
    mask = None
    if masked:
        mask = np.array([[True] * 6, [True] * 2 + [False] * 4, [False] * 6])[..., None]
        x = np.where(mask, x, np.float32(np.nan))
    y, pullback = layer.vjp(x, mask)
    assert_close(y, expected(layer, x, mask=mask), tolerance=2 * CONTRACT)
    np.testing.assert_array_equal(y, layer(x, mask))
    grads = pullback(dy)
    want = oracle.group_norm_gradients(x, dy, layer.scale, layer.bias, num_groups=GROUPS, mask=mask)
    for got, given, reference in zip(grads, (x, layer.scale, layer.bias), want, strict=True):
        assert type(got) is np.ndarray
        assert got.dtype == given.dtype
        assert_gradient(got, reference, rtol=GRADIENT)
    # A pullback can be called again, and is linear.
    np.testing.assert_allclose(pullback(2 * dy).x, 2 * grads.x, rtol=1e-6)
    same = group_norm_vjp(
        x,
        layer.scale,
        layer.bias,
        num_groups=GROUPS,
        mask=mask,
        use_fast_variance=fast,
    )[1](dy)
    np.testing.assert_array_equal(same.x, grads.x)


def test_vjp_of_absent_parameters(rng):
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, use_scale=False, use_bias=False)
    assert layer.scale is None
    assert layer.bias is None
    x, dy = rng.normal(size=(2, 2, 5, CHANNELS))
    y, pullback = layer.vjp(x)
    grads = pullback(dy)
    assert grads.scale is None
    assert grads.bias is None
    want = oracle.group_norm_gradients(x, dy, num_groups=GROUPS)
    assert_gradient(grads.x, want.x, rtol=1e-12)
    assert_close(y, oracle.group_norm(x, num_groups=GROUPS), tolerance=CONTRACT_64)


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, CHANNELS, 1), (5, CHANNELS)], ids=str)
def test_vjp_raises_for_a_cotangent_of_another_shape(shape, rng):
    _, pullback = make(rng).vjp(np.ones((2, 5, CHANNELS)))
    with pytest.raises(ArgumentValueError, match="dy"):
        pullback(np.ones(shape))


def test_assignment(rng):
    layer, x = make(rng), rng.normal(size=(2, 5, CHANNELS)).astype(np.float32)
    layer.scale = np.arange(CHANNELS, dtype=np.float32)
    layer.bias = layer.bias + 1
    assert_close(layer(x), expected(layer, x), tolerance=8 * CONTRACT)
    layer.scale -= 1
    np.testing.assert_array_equal(layer.scale, np.arange(CHANNELS, dtype=np.float32) - 1)
    assert_close(layer(x), expected(layer, x), tolerance=8 * CONTRACT)


def test_assignment_of_a_wrong_shape(rng):
    layer = make(rng)
    with pytest.raises(ArgumentValueError, match=r"scale.*\(3,\)"):
        layer.scale = np.ones(3)


def test_parameters_of_two_feature_axes_have_two_axes(rng):
    layer = GroupNorm((2, 5, 4), (0, 2), num_groups=GROUPS)
    assert layer.scale.shape == layer.bias.shape == (2, 4)
    layer.scale = rng.normal(size=(2, 4)).astype(np.float32)
    x = rng.normal(size=(3, 2, 5, 4)).astype(np.float32)
    want = oracle.group_norm(x, layer.scale, layer.bias, num_groups=GROUPS, feature_axis=(1, 3))
    assert_close(layer(x), want, tolerance=2 * CONTRACT)


@pytest.mark.parametrize("how", [lambda a: pickle.loads(pickle.dumps(a)), copy.deepcopy])
def test_copies_are_equal_and_independent(how, rng):
    layer, x = make(rng, epsilon=0.1), rng.normal(size=(2, 5, CHANNELS))
    other = how(layer)
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    np.testing.assert_array_equal(other(x), layer(x))
    other.scale *= 2
    assert not np.array_equal(other(x), layer(x))


def test_shallow_copy_shares_arrays_but_not_assignments(rng):
    layer = make(rng)
    other = copy.copy(layer)
    assert other.scale is layer.scale
    other.scale = other.scale + 1
    assert not np.array_equal(other.scale, layer.scale)


def test_layers_do_not_share_arrays_returned_by_an_initializer():
    value = np.ones(4, np.float32)
    layers = [GroupNorm(4, num_groups=2, scale_init=lambda shape: value) for _ in range(2)]
    assert not np.shares_memory(layers[0].scale, layers[1].scale)


def test_repr_and_attributes():
    layer = GroupNorm((5, CHANNELS), num_groups=None, group_size=2, epsilon=0.1)
    for part in ("GroupNorm", "5, 8", "epsilon=0.1"):
        assert part in repr(layer)
    assert (layer.num_groups, layer.group_size) == (4, 2)
    assert layer.in_size == layer.out_size == (5, 8)
    assert layer.epsilon == 0.1


@pytest.mark.parametrize("device", [None, "cpu"])
def test_device(device, rng):
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, device=device)
    x = rng.normal(size=(2, CHANNELS))
    assert_close(layer(x), oracle.group_norm(x, num_groups=GROUPS), tolerance=CONTRACT_64)


def test_unknown_device():
    with pytest.raises(ArgumentValueError, match=r"device.*'cuda:0'"):
        GroupNorm(CHANNELS, num_groups=GROUPS, device="cuda:0")


@pytest.mark.parametrize("name", [None, 3, np.int64(1)], ids=repr)
def test_backend_that_is_not_a_string(name):
    with pytest.raises(ArgumentTypeError, match="backend="):
        GroupNorm(CHANNELS, num_groups=GROUPS, backend=name)


@pytest.mark.parametrize("name", ["tensorflow", "Torch", ""], ids=repr)
def test_unknown_backend(name):
    with pytest.raises(ArgumentValueError, match="backend=") as caught:
        GroupNorm(CHANNELS, num_groups=GROUPS, backend=name)
    for known in ("numpy", "jax", "torch", "cupy", "mlx"):
        assert known in str(caught.value)


def test_subclassing_the_factory_class_raises():
    class Mine(GroupNorm):
        pass

    with pytest.raises(ArgumentTypeError, match="Mine derives from GroupNorm"):
        Mine(8, num_groups=2)


def test_unbound_axis_name_raises_when_called(rng):
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, axis_name="shards")
    assert layer.axis_name == "shards"
    with pytest.raises(GroupNormError, match="axis_name"):
        layer(rng.normal(size=(2, CHANNELS)))


@pytest.mark.parametrize("x", [[[1.0] * CHANNELS], 1.0, None, "x"], ids=lambda x: type(x).__name__)
def test_not_an_array(x, rng):
    with pytest.raises(ArgumentTypeError, match="x"):
        make(rng)(x)


def test_masked_arrays_and_matrices_raise(rng):
    layer, x = make(rng), rng.normal(size=(2, CHANNELS))
    with pytest.raises(ArgumentTypeError, match="mask="):
        layer(np.ma.masked_array(x, x > 0))
    with pytest.warns(PendingDeprecationWarning, match="matrix"):
        matrix = np.matrix(x)
    with pytest.raises(ArgumentTypeError, match="matrix"):
        layer(matrix)


def test_portable_layer_converts_parameters_to_the_library_of_x(backend, rng):
    """The result is an array of the input's library, on its device."""
    layer = make(rng)
    x = rng.normal(size=(2, 5, CHANNELS)).astype(np.float32)
    y = layer(backend.asarray(x))
    check_array(backend, y, shape=x.shape, dtype="float32")
    assert_close(backend.to_numpy(y), expected(layer, x), tolerance=2 * CONTRACT)
    # A NumPy mask is a host mask, which every library accepts.
    mask = np.array([[True] * 5, [True] * 2 + [False] * 3])[..., None]
    y = layer(backend.asarray(x), mask)
    assert_close(backend.to_numpy(y), expected(layer, x, mask=mask), tolerance=2 * CONTRACT)


@pytest.mark.needs("torch")
def test_portable_layer_differentiates_only_x(rng):
    import torch

    layer = make(rng)
    x = torch.from_numpy(rng.normal(size=(2, 5, CHANNELS)).astype(np.float32)).requires_grad_()
    dy = rng.normal(size=(2, 5, CHANNELS)).astype(np.float32)
    layer(x).backward(torch.from_numpy(dy))
    want = oracle.group_norm_gradients(
        x.detach().numpy(), dy, layer.scale, layer.bias, num_groups=GROUPS
    )
    assert_gradient(x.grad.numpy(), want.x, rtol=GRADIENT)
    assert type(layer.scale) is np.ndarray


@pytest.mark.needs("jax")
def test_portable_layer_under_jit(rng):
    jax = importlib.import_module("jax")
    layer, x = make(rng), rng.normal(size=(2, 5, CHANNELS)).astype(np.float32)
    assert_close(np.asarray(jax.jit(layer)(x)), expected(layer, x), tolerance=2 * CONTRACT)
