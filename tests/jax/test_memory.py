"""JAX arrays whose memory is gone or shared: an error or right values, never a crash."""

from __future__ import annotations

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupnorm import (
    GroupNorm,
    group_norm,
    group_norm_vjp,
    group_statistics,
    merge_statistics,
    normalize,
)
from groupnorm.errors import ArgumentStateError, ArgumentTypeError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient

SHAPE, GROUPS = (2, 300, 8), 2
IMPLEMENTATIONS = [None, "portable"]


@pytest.fixture(params=IMPLEMENTATIONS, ids=["default", "portable"])
def options(request):
    return {"num_groups": GROUPS, "implementation": request.param}


def draw(rng):
    x, dy = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    return x, dy, rng.normal(size=8).astype(np.float32)


# Deleted and donated arrays ---------------------------------------------------------------------


def given_arrays(rng):
    x, dy, scale = map(jnp.asarray, draw(rng))
    mask = jnp.asarray(rng.random((2, 300, 1)) < 0.7)
    return {"x": x, "scale": scale, "bias": scale + 1, "mask": mask}, dy


def deleted(a):
    a.delete()


def donated(a):
    # XLA keeps no memory of an array that its program does not need.
    jax.jit(lambda a: ~a if a.dtype == bool else a + 1, donate_argnums=0)(a)
    assert a.is_deleted()


MODES = {
    "usual": contextlib.nullcontext,
    "NaNs": lambda: jax.debug_nans(True),
    "not compiled": jax.disable_jit,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lose", [deleted, donated])
@pytest.mark.parametrize("name", ["x", "scale", "bias", "mask"])
def test_a_lost_array_is_an_error(name, lose, mode, options, rng):
    arrays, _ = given_arrays(rng)
    lose(arrays[name])
    for call in (group_norm, group_norm_vjp):
        with (
            MODES[mode](),
            pytest.raises(ArgumentStateError, match=rf"^{name} has shape .*\.copy\(\)"),
        ):
            call(**arrays, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "masked"),
    [("mask", True), *((n, m) for n in ("x", "scale", "bias", "dy") for m in (False, True))],
)
def test_an_array_lost_before_the_pullback(name, masked, mode, options, rng):
    """Is an error if the pullback reads it; else the gradients are those of the call."""
    arrays, dy = given_arrays(rng)
    if not masked:
        del arrays["mask"]
    host = {n: np.array(a) for n, a in arrays.items()}
    want = oracle.group_norm_gradients(
        host.pop("x"), np.array(dy), **{"mask": None, **host}, num_groups=GROUPS
    )
    # Primitives are for one device, and are not used for what the modes of debugging look at.
    compiled = jax.device_count() == 1 and not (masked and mode == "NaNs")
    portable = options["implementation"] == "portable" or not compiled
    with MODES[mode]():
        _, pullback = group_norm_vjp(**arrays, **options)
        deleted({**arrays, "dy": dy}[name])
        if name == "dy" or (name != "mask" and not portable):
            for call in (pullback, jax.jit(pullback)) if name != "dy" else (pullback,):
                with pytest.raises(ArgumentStateError, match=f"^{name} has shape"):
                    call(dy)
            return
        gradients = pullback(dy)
    for g, w in zip(gradients, want, strict=True):
        assert_gradient(np.asarray(g), w, rtol=GRADIENT)


@pytest.mark.parametrize("name", ["x", "mask", "scale", "mean", "count"])
def test_a_lost_array_of_statistics(name, rng):
    arrays, _ = given_arrays(rng)
    x, scale, mask = arrays["x"], arrays["scale"], arrays["mask"]
    statistics = group_statistics(x, mask=mask, num_groups=GROUPS)
    deleted({**arrays, **statistics._asdict()}[name])
    calls = [lambda: normalize(x, statistics, scale, mask=mask, num_groups=GROUPS)]
    if name in arrays:
        calls += [lambda: group_statistics(x, mask=mask, num_groups=GROUPS)] * (name != "scale")
    else:
        calls.append(lambda: merge_statistics(statistics, statistics))
        name = rf"statistics(\[0\])?\.{name}"
    for call in calls:
        with pytest.raises(ArgumentStateError, match=f"^{name} has shape"):
            call()


def test_a_layer_whose_parameters_were_donated(rng):
    """As a step of training does that is given the layer of the step before."""
    layer = GroupNorm(8, num_groups=GROUPS, backend="jax")
    step = jax.jit(lambda layer: jax.tree.map(lambda a: a + 1, layer), donate_argnums=0)
    new, x = step(layer), jnp.asarray(draw(rng)[0])
    assert_close(
        np.asarray(new(x)),
        oracle.group_norm(x, *[np.full(8, i) for i in (2, 1)], num_groups=GROUPS),
        tolerance=2 * CONTRACT,
    )
    for call in (layer, layer.vjp, jax.jit(lambda x: layer(x))):
        with pytest.raises(ArgumentStateError, match=r"^scale has shape"):
            call(x)
    for backend in ("numpy", "jax"):
        with pytest.raises(ArgumentStateError, match=r"^parameter has shape"):
            layer.to_backend(backend)


def test_donated_input(options, rng):
    x, _, _ = draw(rng)
    function = jax.jit(lambda x: group_norm(x, **options), donate_argnums=0)
    given = jnp.array(x)
    y = function(given)
    assert_close(np.asarray(y), oracle.group_norm(x, num_groups=GROUPS), tolerance=CONTRACT)
    with pytest.raises(ArgumentStateError, match=r"^x has shape .* donated"):
        group_norm(given, **options)


# Changed and shared memory --------------------------------------------------------------------


def test_pullbacks_keep_host_parameters_and_masks(options, rng):
    x, dy, scale = draw(rng)
    mask = rng.random((2, 300, 1)) < 0.7
    want = oracle.group_norm_gradients(x, dy, scale, None, num_groups=GROUPS, mask=mask)
    _, pullback = group_norm_vjp(jnp.asarray(x), scale, mask=mask, **options)
    scale *= 3
    mask[:] = True
    assert_gradient(np.asarray(pullback(jnp.asarray(dy)).x), want.x, rtol=GRADIENT)


def test_values_are_those_at_the_time_of_the_call(options, rng):
    """JAX's arrays may share the memory of NumPy's; what it copied must not change."""
    x, _, _ = draw(rng)
    given = jnp.array(x)
    want = oracle.group_norm(x, num_groups=GROUPS)
    y = group_norm(given, **options)
    x *= 100
    assert_close(np.asarray(y), want, tolerance=CONTRACT)


def test_a_cotangent_without_numbers(options, rng):
    x, _, _ = draw(rng)
    _, pullback = group_norm_vjp(jnp.asarray(x), **options)
    with pytest.raises(ArgumentTypeError, match=r"dy has dtype .*float0"):
        pullback(np.zeros(SHAPE, jax.dtypes.float0))


@pytest.mark.parametrize("argument", ["x", "scale", "bias", "mask", "dy"])
@pytest.mark.parametrize("kind", ["keys", "float8_e4m3fn", "float4_e2m1fn"])
def test_arrays_that_jax_does_not_combine_with_numbers(kind, argument, options, rng):
    x, dy, scale = map(jnp.asarray, draw(rng))
    given = {"x": x, "scale": scale, "bias": scale, "mask": jnp.ones((2, 300, 1), bool), "dy": dy}
    shape = given[argument].shape
    if kind == "keys":
        given[argument] = jax.random.split(jax.random.key(0), shape)
    else:
        given[argument] = jnp.ones(shape, kind)
    dy = given.pop("dy")
    if kind != "keys" and argument in ("mask", "dy"):  # converted as they are
        assert group_norm_vjp(**given, **options)[1](dy).x.dtype == jnp.float32
        return
    with pytest.raises(ArgumentTypeError, match=f"{argument} has dtype"):
        group_norm_vjp(**given, **options)[1](dy)


def test_a_result_dtype_that_jax_does_not_promote(options, rng):
    x, _, _ = draw(rng)
    with pytest.raises(ArgumentTypeError, match="dtype='float8_e4m3fn'"):
        group_norm(jnp.asarray(x), dtype="float8_e4m3fn", **options)


@pytest.mark.parametrize("transform", ["vmap of grad", "jacobians", "jvp of vjp", "scan", "remat"])
def test_transformations(transform, options, rng):
    """By JAX's own derivatives of a plain formula in float64."""
    x, dy, scale = (a[..., :20, :] if a.ndim > 1 else a for a in draw(rng))

    def ours(x, scale):
        return group_norm(x, scale, **options)

    def plain(x, scale):
        grouped = x.reshape(*x.shape[:-1], GROUPS, -1)
        mean = grouped.mean((-3, -1), keepdims=True)
        var = ((grouped - mean) ** 2).mean((-3, -1), keepdims=True)
        return ((grouped - mean) / jnp.sqrt(var + 1e-6)).reshape(x.shape) * scale

    def derived(f, x, dy, scale):
        def loss(x, scale):
            return (f(x, scale) * dy[:1]).sum()

        if transform == "vmap of grad":
            return jax.vmap(
                jax.grad(lambda a, s: (f(a[None], s) * dy[:1]).sum(), (0, 1)), (0, None)
            )(x, scale)
        if transform == "jacobians":

            def few(s):
                return f(x, s)[0, :3]

            return jax.jacrev(few)(scale), jax.jacfwd(few)(scale), jax.hessian(loss, 1)(x, scale)
        if transform == "jvp of vjp":
            return jax.jvp(jax.grad(loss), (x, scale), (dy, scale))
        if transform == "scan":
            return jax.grad(
                lambda x: jax.lax.scan(lambda c, _: (f(c, scale), None), x, None, 3)[0][0, 0].sum()
            )(x)
        return jax.grad(jax.checkpoint(loss), (0, 1))(x, scale)

    got = jax.jit(partial(derived, ours))(*map(jnp.asarray, (x, dy, scale)))
    with jax.enable_x64(True):
        want = derived(plain, *(jnp.asarray(a, "float64") for a in (x, dy, scale)))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_gradient(np.asarray(g), np.asarray(w), rtol=2e-5, at_least=1e-3)
