"""`jax.export` with symbolic sizes: one program for all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from groupnorm import GroupNorm, group_norm
from groupnorm.errors import ArgumentTypeError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient

CHANNELS = 8
# Symbolic shape, feature axis, and shapes to call the program with: short and long axes, one
# position, less than a block and several with and without a remainder.
SHAPES = {
    "b, 20, 8": (-1, [(1, 20, 8), (5, 20, 8)]),
    "b, t, 8": (-1, [(2, 1, 8), (2, 20, 8), (1, 512, 8), (1, 1500, 8)]),
    "b, 8, t": (1, [(2, 8, 1), (2, 8, 20), (1, 8, 1025)]),
    "b, h, w, 8": (-1, [(1, 1, 1, 8), (2, 3, 5, 8), (1, 3, 600, 8)]),
    "b, 8, h, w": (1, [(2, 8, 3, 5), (1, 8, 700, 2)]),
    "b, 3*h, 8": (-1, [(2, 3, 8), (1, 600, 8)]),
    "3, h, 2, w, 4": ((2, 4), [(3, 4, 2, 5, 4)]),
}


def masked_shape(shape, axis):
    axes = (axis,) if isinstance(axis, int) else axis
    return tuple(1 if i in {a % len(shape) for a in axes} else n for i, n in enumerate(shape))


@pytest.mark.parametrize("keywords", [{}, {"use_fast_variance": False, "activation": "relu"}])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("spec", SHAPES)
def test_symbolic_sizes(spec, masked, keywords, rng):
    axis, shapes = SHAPES[spec]
    symbolic = export.symbolic_shape(spec)
    options = {"num_groups": 2, "feature_axis": axis}

    def function(x, scale, dy, mask):
        y, pullback = jax.vjp(
            lambda x, scale: group_norm(x, scale, mask=mask, **options, **keywords), x, scale
        )
        return y, *pullback(dy)

    def typed(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    mask_type = typed(masked_shape(symbolic, axis), bool) if masked else None
    x_type = typed(symbolic)
    program = export.export(jax.jit(function))(x_type, typed((CHANNELS,)), x_type, mask_type)
    for shape in shapes:
        x, dy = (100 + rng.normal(size=shape), rng.normal(size=shape))
        x, dy = x.astype(np.float32), dy.astype(np.float32)
        scale = rng.uniform(0.5, 2, CHANNELS).astype(np.float32)
        mask = rng.random(masked_shape(shape, axis)) < 0.7 if masked else None
        if masked:
            x = np.where(mask, x, np.float32(np.nan))
        y, dx, dscale = program.call(x, scale, dy, mask)
        want = oracle.group_norm(x, scale, mask=mask, **options)
        slope = np.ones_like(want)
        if keywords:
            slope, want = want > 0, np.maximum(want, 0)
        assert_close(np.asarray(y), want, tolerance=2 * CONTRACT)
        gradients = oracle.group_norm_gradients(x, dy * slope, scale, mask=mask, **options)
        rtol = 20 * GRADIENT  # for an offset of 100
        # With few elements a gradient may cancel to nothing.
        assert_gradient(np.asarray(dx), gradients.x, rtol=rtol, at_least=1.0)
        assert_gradient(np.asarray(dscale), gradients.scale, rtol=rtol)


def test_symbolic_sizes_are_polymorphic_when_called_by_another_program(rng):
    """An exported program inside a program that is exported for other symbols."""
    t = export.symbolic_shape("t, 8")
    inner = export.export(jax.jit(lambda x: group_norm(x[None], num_groups=2)[0]))(
        jax.ShapeDtypeStruct(t, jnp.float32)
    )
    outer = export.export(jax.jit(inner.call))(
        jax.ShapeDtypeStruct(export.symbolic_shape("2*n, 8"), jnp.float32)
    )
    x = rng.normal(size=(46, 8)).astype(np.float32)
    want = oracle.group_norm(x[None], num_groups=2)[0]
    assert_close(np.asarray(outer.call(x)), want, tolerance=CONTRACT)


def test_long_symbolic_sums_keep_their_digits(rng):
    shape = export.symbolic_shape("1, t, 2")
    program = export.export(jax.jit(lambda x: group_norm(x, num_groups=1)))(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    x = (1e5 + rng.normal(size=(1, 300_001, 2))).astype(np.float32)
    want = oracle.group_norm(x, num_groups=1)
    assert_close(np.asarray(program.call(x)), want, tolerance=CONTRACT)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_as_an_argument(bias, rng):
    """Saved, read again, and called with other parameters and sizes; differentiated too."""
    layer = GroupNorm(
        (CHANNELS, ...), 0, num_groups=2, epsilon=0.25, use_bias=bias, activation="relu",
        backend="jax", axis_index_groups=None, scale_init=rng.uniform(0.5, 2, CHANNELS),
    )  # fmt: skip
    h, w = export.symbolic_shape("h, w")
    x_type = jax.ShapeDtypeStruct((2, CHANNELS, h, w), jnp.float32)
    program = export.export(jax.jit(lambda layer, x: layer(x)))(layer, x_type)
    again = export.deserialize(program.serialize(vjp_order=1))
    other = jax.tree.map(lambda p: p + 1, layer)
    for sizes in ((3, 5), (1, 1), (40, 30)):
        x, dy = rng.normal(size=(2, 2, CHANNELS, *sizes)).astype(np.float32)
        y, pullback = jax.vjp(again.call, other, jnp.asarray(x))
        parameters = [None if p is None else np.asarray(p) for p in (other.scale, other.bias)]
        options = {"num_groups": 2, "feature_axis": 1, "epsilon": 0.25}
        want = oracle.group_norm(x, *parameters, **options)
        assert_close(np.asarray(y), np.maximum(want, 0), tolerance=2 * CONTRACT)
        gradient, dx = pullback(jnp.asarray(dy))
        wanted = oracle.group_norm_gradients(x, dy * (want > 0), *parameters, **options)
        assert type(gradient) is type(layer)
        assert (gradient.bias is not None) == bias
        assert_gradient(np.asarray(gradient.scale), wanted.scale, rtol=GRADIENT, at_least=1.0)
        assert_gradient(np.asarray(dx), wanted.x, rtol=GRADIENT, at_least=1.0)
    with pytest.raises(ValueError, match="pytree"):
        again.call(GroupNorm(CHANNELS, num_groups=2, backend="jax", use_bias=bias), x)


def test_a_layer_of_other_objects_than_arrays_is_not_saved():
    class Held:
        def __init__(self, value):
            self.value = value

    jax.tree_util.register_pytree_node(Held, lambda h: ((h.value,), None), lambda _, c: Held(*c))
    export.register_pytree_node_serialization(
        Held,
        serialized_name="tests.Held",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: None,
    )
    layer = GroupNorm(CHANNELS, num_groups=2, backend="jax", param_type=Held)
    x = jax.ShapeDtypeStruct((2, CHANNELS), jnp.float32)
    program = export.export(jax.jit(lambda layer, x: layer(x)))(layer, x)
    with pytest.raises(ArgumentTypeError, match="param_type=None"):
        program.serialize()
