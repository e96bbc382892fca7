"""All examples of the documentation this layer's parameters come from, with our names."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest

from groupnorm import GroupNorm, initializers
from groupnorm.errors import ArgumentValueError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, assert_close

LAYERS = ["numpy", *(pytest.param(n, marks=pytest.mark.needs(n)) for n in ("jax", "torch"))]


def as_array_of(name: str, a: np.ndarray):
    if name == "jax":
        return importlib.import_module("jax.numpy").asarray(a)
    if name == "torch":
        return importlib.import_module("torch").from_numpy(a)
    return a


def host(y) -> np.ndarray:
    return np.asarray(y.detach() if hasattr(y, "detach") else y)


@pytest.fixture
def x(rng) -> np.ndarray:
    return rng.normal(size=(3, 4, 5, 6)).astype(np.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_a_group_norm_layer_with_3_groups(name, x):
    layer = GroupNorm(x.shape, num_groups=3, backend=name)
    y = layer(as_array_of(name, x))
    assert_close(host(y), oracle.group_norm(x, num_groups=3), tolerance=CONTRACT)


@pytest.mark.parametrize("name", LAYERS)
def test_one_group_is_layer_norm_over_axes_1_2_3(name, x):
    y = host(GroupNorm(x.shape, num_groups=1, backend=name)(as_array_of(name, x)))
    wide = x.astype(np.float64)
    mean, var = (f(wide, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
    assert_close(y, (wide - mean) / np.sqrt(var + 1e-6), tolerance=CONTRACT)


@pytest.mark.needs("brainstate", "jax")
def test_one_group_is_brainstates_layer_norm(x):
    brainstate = importlib.import_module("brainstate")
    y1 = GroupNorm(x.shape, num_groups=1, backend="jax")(as_array_of("jax", x))
    y2 = brainstate.nn.LayerNorm(x.shape, reduction_axes=(1, 2, 3))(x)
    np.testing.assert_allclose(y1, y2, rtol=1e-5, atol=1e-6)


@pytest.mark.needs("torch")
def test_one_group_is_torchs_layer_norm(x):
    torch = importlib.import_module("torch")
    y1 = GroupNorm(x.shape, num_groups=1, backend="torch")(torch.from_numpy(x))
    y2 = torch.nn.functional.layer_norm(torch.from_numpy(x), x.shape[1:], eps=1e-6)
    torch.testing.assert_close(y1.detach(), y2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_group_size_instead_of_num_groups(name, rng):
    layer = GroupNorm((12,), num_groups=None, group_size=4, backend=name)
    assert (layer.num_groups, layer.group_size) == (3, 4)
    x = rng.normal(size=(2, 7, 12)).astype(np.float32)
    y = host(layer(as_array_of(name, x)))
    assert_close(y, oracle.group_norm(x, num_groups=3), tolerance=CONTRACT)


@pytest.mark.parametrize("both", [{"group_size": 4}, {"num_groups": None}], ids=["both", "neither"])
def test_either_num_groups_or_group_size_must_be_given_but_not_both(both):
    with pytest.raises(ArgumentValueError, match=r"num_groups.*group_size"):
        GroupNorm((32,), **both)


@pytest.mark.parametrize("name", LAYERS)
def test_defaults(name):
    """As documented: 32 groups, epsilon 1e-6, bias and scale in use, initialized to 0 and 1."""
    layer = GroupNorm((64,), backend=name)
    assert (layer.num_groups, layer.epsilon) == (32, 1e-6)
    np.testing.assert_array_equal(host(layer.scale), np.ones(64))
    np.testing.assert_array_equal(host(layer.bias), np.zeros(64))
    parameters = inspect.signature(GroupNorm.__init__).parameters
    assert parameters["use_fast_variance"].default is True
    assert parameters["reduction_axes"].default is parameters["axis_name"].default is None
    assert parameters["bias_init"].default is initializers.zeros


@pytest.mark.parametrize("name", LAYERS)
def test_update_with_a_mask(name, x):
    """The positions used for mean and variance; the batch sizes do not matter."""
    mask = np.zeros((3, 4, 5, 1), bool)
    mask[:, :2] = True
    layer = GroupNorm(x.shape, num_groups=3, backend=name)
    y = host(layer.update(as_array_of(name, x), mask=as_array_of(name, mask)))
    assert_close(y, oracle.group_norm(x, num_groups=3, mask=mask), tolerance=CONTRACT)


@pytest.mark.parametrize("name", LAYERS)
def test_does_not_depend_on_the_batch(name, x):
    layer = GroupNorm(x.shape, num_groups=3, backend=name)
    together = host(layer(as_array_of(name, x)))
    for i in range(len(x)):
        alone = host(layer(as_array_of(name, x[i : i + 1])))
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("scale", "bias"), [(True, False), (False, True), (False, False)])
def test_scale_and_bias_switched_off(name, scale, bias, x):
    layer = GroupNorm(
        x.shape,
        num_groups=3,
        use_scale=scale,
        use_bias=bias,
        scale_init=initializers.constant(2.0),
        bias_init=initializers.constant(3.0),
        backend=name,
    )
    assert (layer.scale is not None, layer.bias is not None) == (scale, bias)
    want = (2 if scale else 1) * oracle.group_norm(x, num_groups=3) + (3 if bias else 0)
    assert_close(host(layer(as_array_of(name, x))), want, tolerance=2 * CONTRACT)
