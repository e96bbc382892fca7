"""Parity with other libraries' group norms where they are correct.

Where one is wrong, the docstring of the test that shows this library to be correct names it.
"""

from __future__ import annotations

import inspect
import itertools

import brainstate
import equinox as eqx
import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from groupnorm import GroupNorm, group_norm
from groupnorm.testing import oracle
from tests.rows import CONTRACT, assert_close

CHANNELS, GROUPS = 6, 3
SHAPES = [(4, 6), (3, 5, 6), (2, 4, 5, 6), (2, 3, 2, 4, 6)]


def draw(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x, *rng.normal(size=(2, shape[-1])).astype(np.float32)


def assert_all_agree(theirs, ours, reference) -> None:
    """Compare the peer and this library with the oracle, so that they do not share an error."""
    assert_close(np.asarray(theirs), reference, tolerance=4 * CONTRACT)
    assert_close(np.asarray(ours), reference, tolerance=2 * CONTRACT)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flax_linen(shape, fast, rng):
    x, scale, bias = draw(rng, *shape)
    peer = flax.linen.GroupNorm(num_groups=GROUPS, use_fast_variance=False)
    theirs = peer.apply({"params": {"scale": scale, "bias": bias}}, x)
    ours = group_norm(jnp.asarray(x), scale, bias, num_groups=GROUPS, use_fast_variance=fast)
    assert theirs.dtype == ours.dtype
    assert_all_agree(theirs, ours, oracle.group_norm(x, scale, bias, num_groups=GROUPS))


REDUCTIONS = [
    axes
    for size in range(1, 5)
    for axes in itertools.combinations(range(4), size)
    if 3 in axes  # the features
]


@pytest.mark.parametrize("axes", REDUCTIONS, ids=str)
def test_flax_linen_with_reduction_axes(axes, rng):
    x, scale, bias = draw(rng, 2, 4, 5, 6)
    # flax's fast variance loses three digits on groups of two elements.
    peer = flax.linen.GroupNorm(num_groups=GROUPS, reduction_axes=axes, use_fast_variance=False)
    theirs = peer.apply({"params": {"scale": scale, "bias": bias}}, x)
    ours = group_norm(jnp.asarray(x), scale, bias, num_groups=GROUPS, reduction_axes=axes)
    want = oracle.group_norm(x, scale, bias, num_groups=GROUPS, reduction_axes=axes)
    assert_all_agree(theirs, ours, want)


def test_flax_linen_with_a_mask_and_its_gradients(rng):
    x, scale, bias = draw(rng, 2, 5, 6)
    dy = rng.normal(size=x.shape).astype(np.float32)
    mask = np.broadcast_to(rng.random((2, 5, 1)) < 0.7, x.shape)
    peer = flax.linen.GroupNorm(num_groups=GROUPS, use_fast_variance=False)

    def theirs(x, scale, bias):
        return peer.apply({"params": {"scale": scale, "bias": bias}}, x, mask=mask)

    def ours(x, scale, bias):
        return group_norm(x, scale, bias, num_groups=GROUPS, mask=mask)

    want = oracle.group_norm(x, scale, bias, num_groups=GROUPS, mask=mask)
    arguments = tuple(jnp.asarray(a) for a in (x, scale, bias))
    assert_all_agree(theirs(*arguments), ours(*arguments), want)
    for got, peers in zip(
        jax.vjp(ours, *arguments)[1](dy), jax.vjp(theirs, *arguments)[1](dy), strict=True
    ):
        np.testing.assert_allclose(got, peers, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flax_nnx(shape, rng):
    x, scale, bias = draw(rng, *shape)
    rngs = flax.nnx.Rngs(0)
    peer = flax.nnx.GroupNorm(CHANNELS, GROUPS, use_fast_variance=False, rngs=rngs)
    peer.scale[...], peer.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    ours = group_norm(jnp.asarray(x), scale, bias, num_groups=GROUPS)
    assert_all_agree(peer(x), ours, oracle.group_norm(x, scale, bias, num_groups=GROUPS))


@pytest.mark.parametrize("shape", [(4, 6), (3, 6, 5), (2, 6, 4, 5), (2, 6, 3, 2, 4)], ids=str)
def test_torch(shape, rng):
    x = rng.normal(size=shape).astype(np.float32)
    scale, bias = rng.normal(size=(2, CHANNELS)).astype(np.float32)
    dy = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    peer = torch.nn.GroupNorm(GROUPS, CHANNELS)
    layer = GroupNorm((CHANNELS, ...), 0, num_groups=GROUPS, epsilon=1e-5, backend="torch")
    with torch.no_grad():
        peer.weight.copy_(torch.from_numpy(scale))
        peer.bias.copy_(torch.from_numpy(bias))
    layer.load_state_dict(peer.state_dict())
    results = []
    for module in (peer, layer):
        leaf = torch.from_numpy(x.copy()).requires_grad_()
        y = module(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad, module.weight.grad, module.bias.grad))
    want = oracle.group_norm(x, scale, bias, num_groups=GROUPS, feature_axis=1, epsilon=1e-5)
    assert_all_agree(results[0][0], results[1][0], want)
    for theirs, ours in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5)], ids=str)
def test_equinox(shape, rng):
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    scale, bias = rng.normal(size=(2, CHANNELS)).astype(np.float32)
    peer = eqx.nn.GroupNorm(GROUPS, CHANNELS)
    peer = eqx.tree_at(lambda p: (p.weight, p.bias), peer, (jnp.asarray(scale), jnp.asarray(bias)))
    theirs = jax.vmap(peer)(x)
    ours = group_norm(jnp.asarray(x), scale, bias, num_groups=GROUPS, feature_axis=1, epsilon=1e-5)
    want = oracle.group_norm(x, scale, bias, num_groups=GROUPS, feature_axis=1, epsilon=1e-5)
    assert_all_agree(theirs, ours, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_brainstate(shape, rng):
    x, scale, bias = draw(rng, *shape)
    peer = brainstate.nn.GroupNorm((CHANNELS,), num_groups=GROUPS, use_fast_variance=False)
    peer.weight.value = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    layer = GroupNorm((CHANNELS,), num_groups=GROUPS, backend="jax")
    layer = jax.tree.unflatten(jax.tree.structure(layer), [jnp.asarray(scale), jnp.asarray(bias)])
    assert_all_agree(
        peer(x), layer(jnp.asarray(x)), oracle.group_norm(x, scale, bias, num_groups=GROUPS)
    )


def test_signature_is_compatible_with_brainstate():
    """All its parameters by name, the positional ones in its order, with its defaults."""
    theirs, ours = (
        {
            name: p
            for name, p in inspect.signature(cls.__init__).parameters.items()
            if name != "self"
        }
        for cls in (brainstate.nn.GroupNorm, GroupNorm)
    )
    assert set(theirs) <= set(ours)
    positional = [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    for name, parameter in theirs.items():
        if not name.endswith("_init") and name not in ("param_type", "in_size"):
            assert ours[name].default == parameter.default, name
            assert ours[name].kind == parameter.kind, name
