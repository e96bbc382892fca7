"""The cases of keras's tests of `keras.layers.GroupNormalization`, with its PyTorch backend.

keras's tests of regularizers and constraints are about its own base class; what they mean for a
layer is that its parameters can be read, penalized and changed.
"""

from __future__ import annotations

import os
import pickle

os.environ["KERAS_BACKEND"] = "torch"  # read when keras is imported, which only this file does

import keras
import numpy as np
import pytest
import torch

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
)
from tests.rows import CONTRACT

DIFFERENT_ON_PURPOSE = {
    "large_mean": Difference(
        "mean 1e4 times the spread (PyTorch and NumPy backends)",
        "NaN: the variance E[x²] − E[x]² becomes negative",
        "errors below 5e-6",
        "NaN",
    ),
    "constant_group": Difference(
        "a constant group (the same backends)", "NaN, likewise", "the bias, exactly", "NaN"
    ),
    "huge_values": Difference("values of 1e20", "0: their squares overflow", "normalized", 0.9),
    "masking": Difference(
        "a mask, of a `Masking` layer (`supports_masking` is true)",
        "ignored",
        "`mask=` selects the elements of mean and variance",
        0.1,
    ),
    "leading_axis": Difference(
        "`axis=0`", "wrong: the axes are shifted", "there is no batch then", 0.5
    ),
    "integers": Difference(
        "integer input", "the result is truncated to integers", "a float result", 0.5
    ),
    "empty_samples": Difference("samples without positions", "raises", "empty results", "raises"),
    "numpy_integers": Difference(
        "`groups` of type `np.int64`", "raises", "any integer type", "raises"
    ),
    "bool_for_an_integer": Difference("`groups=True`", "accepts it as 1", "raises", "accepts"),
    "negative_epsilon": Difference("`epsilon=-1.0`", "accepts it", "raises", "accepts"),
}

EPSILON = 1e-3  # keras's default


def peer_of(groups, **options):
    return keras.layers.GroupNormalization(groups=groups, **options)


def plain(groups, **options):
    return peer_of(groups, scale=False, center=False, **options)


def compare(theirs, x, *parameters, **options):
    options = {"epsilon": EPSILON, **options}
    ours = group_norm(torch.from_numpy(x), *map(torch.from_numpy, parameters), **options)
    want = oracle.group_norm(x, *parameters, **options)
    assert_all_agree(theirs, ours, want, peer=1e-4)
    return ours


@pytest.mark.parametrize(("groups", "shape"), [(32, (3, 4, 32)), (4, (3, 4, 4))], ids=str)
def test_a_trainable_layer(groups, shape, rng):
    """Shapes, two parameters, a penalty on them, a change of them, their gradients."""
    x = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    dy = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    regularizer = keras.regularizers.L2(0.01)
    peer = peer_of(groups, gamma_regularizer=regularizer, beta_regularizer=regularizer)
    peer.build(shape)
    layer = GroupNorm(shape[-1], num_groups=groups, epsilon=EPSILON, backend="torch")
    assert len(peer.trainable_weights) == len(list(layer.parameters())) == 2
    assert not peer.non_trainable_weights
    assert not list(layer.buffers())
    values = rng.normal(size=(2, shape[-1])).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)  # as the constraint `UnitNorm`
    pairs = ((peer.gamma, layer.weight, values[0]), (peer.beta, layer.bias, values[1]))
    for theirs, ours, value in pairs:
        theirs.assign(value)
        with torch.no_grad():
            ours.copy_(torch.from_numpy(value))
        penalty = 0.01 * (ours**2).sum()
        np.testing.assert_allclose(regularizer(theirs).item(), penalty.item(), rtol=1e-6)
    want = oracle.group_norm(x.numpy(), *values, num_groups=groups, epsilon=EPSILON)
    y, z = peer(x), layer(x)
    assert_all_agree(y, z, want, peer=1e-4)
    assert y.shape == z.shape == shape
    (y * dy).sum().backward()
    (z * dy).sum().backward()
    reference = oracle.group_norm_gradients(
        x.numpy(), dy.numpy(), *values, num_groups=groups, epsilon=EPSILON
    )
    for (theirs, ours, _), gradient in zip(pairs, reference[1:], strict=True):
        np.testing.assert_allclose(ours.grad, gradient, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(theirs.value.grad, gradient, rtol=1e-3, atol=1e-3)


def test_a_layer_can_be_made_again_from_what_is_saved(rng):
    x = torch.from_numpy(rng.normal(size=(3, 4, 6)).astype(np.float32))
    peer = peer_of(3, epsilon=1e-4, axis=-1)
    again = keras.layers.GroupNormalization.from_config(peer.get_config())
    layer = GroupNorm(6, num_groups=3, epsilon=1e-4, backend="torch")
    copy = pickle.loads(pickle.dumps(layer))
    assert (again.groups, again.epsilon) == (copy.num_groups, copy.epsilon) == (3, 1e-4)
    assert torch.equal(copy(x), layer(x))
    torch.testing.assert_close(again(x), layer(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(dtype, rng):
    """float32 parameters and statistics, and results in half precision."""
    x = torch.from_numpy(rng.normal(size=(3, 4, 6))).to(getattr(torch, dtype))
    peer = peer_of(3, dtype=f"mixed_{dtype}")
    layer = GroupNorm(6, num_groups=3, epsilon=EPSILON, dtype=dtype, backend="torch")
    theirs, ours = peer(x), layer(x)
    assert peer.gamma.dtype == "float32"
    assert layer.weight.dtype == torch.float32
    want = oracle.group_norm(x.float().numpy(), num_groups=3, epsilon=EPSILON)
    assert_all_agree(theirs, ours, want, tolerance=HALF[dtype])


def test_parameters_above_half_precision_under_autocast():
    """70000 is infinite in float16: assigning it under autocast must not round it."""
    layer = GroupNorm(4, num_groups=2, backend="torch")
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        layer.weight.fill_(70000)
        assert layer.weight.tolist() == [70000.0] * 4
        assert layer(torch.zeros(1, 2, 4)).isfinite().all()


def test_input_above_half_precision():
    x = torch.full((2, 4, 8), 70000.0)
    y = group_norm(x, num_groups=2, dtype="float16")
    assert y.dtype == torch.float16
    assert not y.any()


# Axes and values -------------------------------------------------------------------------------


def test_instance_norm():
    """keras: groups=-1, or as many as channels. Two different positions give -1 and 1."""
    x = np.array([[[-1, 2, 0, 5], [3, 1, 0.5, -7]]], dtype=np.float32)
    for theirs in (plain(-1)(x), plain(4)(x)):
        ours = compare(theirs, x, num_groups=None, group_size=1)
        np.testing.assert_allclose(ours, [[[-1, 1, -1, 1], [1, -1, 1, -1]]], atol=0.02)


@pytest.mark.parametrize(
    ("groups", "shape", "axis"),
    [
        (1, (1, 8), -1),
        (2, (1, 8), 1),
        (1, (1, 2, 4), -1),
        (2, (1, 2, 4), 2),
        (2, (1, 4, 2, 2), 1),
        (3, (2, 5, 6, 4), 2),
        (3, (2, 6, 4, 5), -3),
    ],
    ids=str,
)
def test_axis(groups, shape, axis, rng):
    x = rng.normal(size=shape).astype(np.float32)
    compare(plain(groups, axis=axis)(x), x, num_groups=groups, feature_axis=axis)
    peer = peer_of(groups, axis=axis)
    peer.build(shape)
    parameters = rng.normal(size=(2, shape[axis])).astype(np.float32)
    peer.set_weights(list(parameters))
    compare(peer(x), x, *parameters, num_groups=groups, feature_axis=axis)


def test_parameters_broadcast_along_channels_first():
    """A ramp: both groups have the same deviations from their means, so the same results."""
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 2, 2)
    y = compare(peer_of(2, axis=1)(x), x, num_groups=2, feature_axis=1)
    np.testing.assert_allclose(y[:, :2], y[:, 2:], atol=1e-6)
    ramp = (np.arange(8) - 3.5) / np.sqrt(5.25 + EPSILON)
    np.testing.assert_allclose(y[0, :2].reshape(8), ramp, atol=1e-6)


# Errors --------------------------------------------------------------------------------------


def test_an_unknown_number_of_channels():
    assert_same_error(
        lambda: peer_of(32)(keras.Input(shape=(2, 2, 2, None))),
        lambda: GroupNorm((2, 2, 2, None), backend="torch"),
        match="in_size",
    )


@pytest.mark.parametrize("groups", [5, 3])
def test_groups_that_do_not_divide_the_channels(groups):
    x = np.ones((2, 2, 2, 4), np.float32)
    assert_same_error(
        lambda: peer_of(groups)(x),
        lambda: group_norm(torch.from_numpy(x), num_groups=groups),
        match=f"num_groups={groups}",
    )


@pytest.mark.parametrize("groups", [0, -2, 1.5, "32"])
def test_invalid_groups(groups):
    assert_same_error(
        lambda: peer_of(groups),
        lambda: GroupNorm(32, num_groups=groups, backend="torch"),
        match="num_groups",
    )


# Differences ---------------------------------------------------------------------------------


def values(x, peer, **options) -> Case:
    given = {"num_groups": 3, "feature_axis": 1, "epsilon": EPSILON, **options}
    return Case(
        lambda: peer(x),
        lambda: group_norm(torch.from_numpy(x), **given),
        oracle.group_norm(x, **given),
        2 * CONTRACT,
    )


def large_mean(rng):
    return values(draw(rng, 2, 6, 8, 8) + np.float32(1e4), plain(3, axis=1))


def constant_group(rng):
    return values(np.full((2, 6, 8, 8), 10000.1, np.float32), plain(3, axis=1))


def huge_values(rng):
    return values(np.float32(1e20) * draw(rng, 2, 6, 8, 8), plain(3, axis=1))


def masking(rng):
    """Time steps of zeros are masked out."""
    x = 1 + draw(rng, 2, 8, 6)
    x[:, 5:] = 0
    mask = np.arange(8).reshape(8, 1) < 5
    peer = keras.Sequential([keras.layers.Masking(mask_value=0.0), plain(3)])
    options = {"num_groups": 3, "epsilon": EPSILON, "mask": mask}
    return Case(
        lambda: peer(x)[:, :5],
        lambda: group_norm(torch.from_numpy(x), **options)[:, :5],
        oracle.group_norm(x, **options)[:, :5],
    )


def leading_axis(rng):
    return values(draw(rng, 6, 4, 5), plain(3, axis=0), feature_axis=0)


def integers(rng):
    return values(rng.integers(-9, 9, size=(2, 6, 8)).astype(np.int32), plain(3, axis=1))


def empty_samples(rng):
    return values(draw(rng, 2, 6, 0, 4), plain(3, axis=1))


def numpy_integers(rng):
    x = draw(rng, 2, 6, 4)
    case = values(x, None, num_groups=np.int64(3))
    return case._replace(theirs=lambda: plain(np.int64(3), axis=1)(x))


def bool_for_an_integer(rng):
    x = torch.zeros(2, 4, 6)
    return Case(lambda: plain(True)(x), lambda: group_norm(x, num_groups=True), ArgumentTypeError)


def negative_epsilon(rng):
    x = torch.zeros(2, 4, 6)
    return Case(
        lambda: plain(3, epsilon=-1.0)(x),
        lambda: group_norm(x, num_groups=3, epsilon=-1.0),
        ArgumentValueError,
    )


@pytest.mark.parametrize("name", DIFFERENT_ON_PURPOSE)
def test_different_on_purpose(name, rng):
    assert_differs(DIFFERENT_ON_PURPOSE[name], globals()[name](rng))


def test_the_page_lists_these_differences():
    assert_listed("keras", DIFFERENT_ON_PURPOSE)
