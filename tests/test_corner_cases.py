"""Corners that once went wrong, each in a few lines."""

import numpy as np
import pytest

from groupnorm import GroupNorm, errors, group_norm, group_norm_vjp
from tests import oracle


@pytest.fixture
def x(rng):
    return rng.normal(size=(1, 20, 4)).astype(np.float32)


@pytest.mark.parametrize("padding", [np.finfo(np.float32).min, 1e37, -1e37])
def test_huge_padding_without_a_cotangent_leaves_gradients_finite(quick_backend, padding, x, rng):
    valid = (np.arange(20) < 15)[:, None]
    padded = np.where(valid, 0.01 * x, np.float32(padding))
    dy = np.where(valid, rng.normal(size=x.shape), 0).astype(np.float32)
    scale = np.ones(4, np.float32)
    _, pullback = group_norm_vjp(
        quick_backend.asarray(padded), scale, num_groups=2, mask=quick_backend.asarray(valid)
    )
    got = pullback(quick_backend.asarray(dy))
    want = oracle.group_norm_gradients(
        np.where(valid, padded, np.nan), dy, scale, num_groups=2, mask=valid
    )
    for actual, expected in ((got.x, want.x), (got.scale, want.scale)):
        actual = quick_backend.to_numpy(actual)
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_fully_masked_group_is_not_scaled_up(quick_backend):
    y = group_norm(quick_backend.asarray(np.full((1, 20, 4), 1e30, "f")), num_groups=2, mask=False)
    np.testing.assert_allclose(quick_backend.to_numpy(y), 1e30, rtol=1e-6)


def test_gradients_of_integer_parameters_are_not_rounded(quick_backend, x, rng):
    dy = rng.normal(size=x.shape).astype(np.float32)
    scale = np.ones(4, int)
    _, pullback = group_norm_vjp(quick_backend.asarray(x), scale, num_groups=2)
    got = quick_backend.to_numpy(pullback(quick_backend.asarray(dy)).scale)
    want = oracle.group_norm_gradients(x, dy, scale.astype(float), num_groups=2).scale
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_gradient_is_never_the_cotangent_itself():
    dy = np.ones(4, np.float32)
    gradients = group_norm_vjp(dy, None, dy, num_groups=2)[1](dy)
    assert not np.shares_memory(gradients.bias, dy)


@pytest.mark.parametrize(
    "scale",
    [np.ones(8, "f")[::-1], np.ones(8, ">f4"), np.ones(16)[::2], np.ones(8)],
    ids=["reversed", "big-endian", "strided", "float64"],
)
def test_host_parameters_of_every_layout_serve_every_library(quick_backend, scale, rng):
    x = rng.normal(size=(2, 9, 8)).astype(np.float32)
    y = group_norm(quick_backend.asarray(x), scale, num_groups=2)
    want = oracle.group_norm(x, scale, num_groups=2)
    np.testing.assert_allclose(quick_backend.to_numpy(y), want, atol=5e-6)


@pytest.mark.needs("jax")
def test_a_float64_constant_serves_jax(rng):
    import jax.numpy as jnp

    x = rng.normal(size=(2, 9, 8)).astype(np.float32)
    y = group_norm(jnp.asarray(x), np.full(8, 2.0), num_groups=2)
    assert y.dtype == jnp.result_type(float)
    np.testing.assert_allclose(y, oracle.group_norm(x, np.full(8, 2.0), num_groups=2), atol=5e-6)


@pytest.mark.parametrize("argument", ["scale", "bias", "mask", "dy"])
def test_masked_arrays_are_refused_everywhere(argument, x):
    masked = np.ma.masked_array(x if argument == "dy" else np.ones(4, np.float32))

    def call(**given):
        dy = given.pop("dy", x)
        return group_norm_vjp(x, num_groups=2, **given)[1](dy)

    call(**{argument: masked.data})
    with pytest.raises(errors.ArgumentTypeError, match=f"{argument} is a numpy.ma.MaskedArray"):
        call(**{argument: masked})


def test_small_values_beside_zeros_keep_their_size_without_epsilon(quick_backend, rng):
    x = np.zeros((1, 4096, 4), np.float32)
    x[0, rng.integers(0, 4096, 6)] = 1e-20
    y = group_norm(quick_backend.asarray(x), num_groups=2, epsilon=0)
    want = oracle.group_norm(x, num_groups=2, epsilon=0)
    np.testing.assert_allclose(quick_backend.to_numpy(y), want, rtol=5e-6, atol=5e-6)


def test_a_subclass_of_the_chooser_is_told_what_to_derive_from():
    class Mine(GroupNorm):
        pass

    with pytest.raises(errors.ArgumentTypeError, match="Mine derives from GroupNorm"):
        Mine(8, num_groups=2)


def test_layers_do_not_share_what_an_initializer_returns_twice():
    value = np.ones(4, np.float32)
    layers = [GroupNorm(4, num_groups=2, scale_init=lambda shape: value) for _ in range(2)]
    assert not np.shares_memory(layers[0].scale, layers[1].scale)


@pytest.mark.needs("torch")
def test_torch_vmap_over_the_bias_alone(rng):
    import torch

    x = torch.tensor(rng.normal(size=(2, 20, 8)))
    biases = torch.tensor(rng.normal(size=(3, 8)))
    got = torch.vmap(lambda b: group_norm(x, None, b, num_groups=2))(biases)
    want = torch.stack([group_norm(x, None, b, num_groups=2) for b in biases])
    torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.needs("torch")
def test_torch_export_with_a_dynamic_length(rng):
    import torch

    layer = GroupNorm(8, num_groups=2, backend="torch")
    example = torch.tensor(rng.normal(size=(4, 30, 8)), dtype=torch.float32)
    shapes = ({1: torch.export.Dim("t", min=2, max=4096)},)
    program = torch.export.export(layer, (example,), dynamic_shapes=shapes)
    for length in (3, 1000):
        x = torch.tensor(1e4 + rng.normal(size=(4, length, 8)), dtype=torch.float32)
        want = oracle.group_norm(x.numpy(), num_groups=2)
        assert np.abs(program.module()(x).detach().numpy() - want).max() <= 5e-6 * 4


@pytest.mark.needs("jax")
def test_replicas_without_a_valid_element_keep_the_digits_of_what_is_masked_out(rng):
    import jax

    x = (1e5 + rng.normal(size=(2, 1, 30, 8))).astype(np.float32)
    mask = np.zeros((2, 1, 30, 1), bool)
    mask[0, :, :20] = True  # the second replica has none
    layer = GroupNorm(8, num_groups=2, axis_name="i", backend="jax")
    got = jax.vmap(layer, axis_name="i")(jax.numpy.asarray(x), jax.numpy.asarray(mask))
    whole = np.concatenate(list(x), axis=1)
    want = oracle.group_norm(whole, num_groups=2, mask=np.concatenate(list(mask), axis=1))
    error = np.abs(np.concatenate(list(np.asarray(got)), axis=1) - want)
    assert (error <= 5e-6 * np.maximum(1, np.abs(want))).all()
