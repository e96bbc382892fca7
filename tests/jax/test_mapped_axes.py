"""Statistics pooled over JAX's mapped axes, on four host devices (`conftest` asks for them)."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from groupnorm import GroupNorm, group_norm
from groupnorm.errors import ArgumentValueError, AxisNameError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, assert_close, assert_gradient
from tests.sharding import CHANNELS, NUM_GROUPS, Case, cases, check, data

pytestmark = pytest.mark.several_jax_devices

SHARDS = 4
MAPS = ("pmap", "shard_map", "shard_map unchecked", "vmap")


@pytest.fixture(autouse=True)
def four_devices():
    assert jax.device_count() >= SHARDS, "conftest sets XLA_FLAGS before JAX starts"


def mesh_of(**axes: int):
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto)


def over_shards(kind: str, function, names=("shards",)):
    """Map function(layer, *arrays) over the arrays' leading axis; all see the same layer."""
    axes = dict(zip(names, (SHARDS,) if len(names) == 1 else (2, 2), strict=True))

    def mapped(layer, *arrays):
        if kind == "pmap":
            in_axes = (None, *(0 for _ in arrays))
            return jax.pmap(function, axis_name=names[0], in_axes=in_axes)(layer, *arrays)
        if kind == "vmap":
            out = function
            for name in reversed(names):
                out = jax.vmap(out, in_axes=(None, *(0 for _ in arrays)), axis_name=name)
            arrays = [a.reshape(*axes.values(), *a.shape[1:]) for a in arrays]
            return jax.tree.map(
                lambda a: a.reshape(SHARDS, *a.shape[len(names) :]), out(layer, *arrays)
            )

        def on_block(layer, *blocks):
            return jax.tree.map(lambda a: a[None], function(layer, *(b[0] for b in blocks)))

        return jax.shard_map(
            on_block,
            mesh=mesh_of(**axes),
            in_specs=(P(), *(P(names) for _ in arrays)),
            out_specs=P(names),
            check_vma=kind == "shard_map",
        )(layer, *arrays)

    return mapped


def make_layer(case: Case, axis_name="shards") -> GroupNorm:
    layer = GroupNorm(
        CHANNELS,
        backend="jax",
        axis_name=axis_name,
        axis_index_groups=case.groups_as_lists,
        **case.keywords,
    )
    whole = data(case)
    structure = jax.tree.structure(layer)
    return jax.tree.unflatten(structure, [jnp.asarray(whole.scale), jnp.asarray(whole.bias)])


def stacked(case: Case):
    """Return x, dy and the mask of the padded shards; the mask is None where none is needed."""
    whole = data(case)
    x = case.padded(whole.x, np.nan)
    # Zero cotangent at the padding: nothing there is part of the whole.
    dy = case.padded(whole.dy, 0)
    if whole.mask is None and len(set(case.sizes)) == 1:
        return jnp.asarray(x), jnp.asarray(dy), None
    mask = np.ones((*whole.x.shape[:2], 1), bool) if whole.mask is None else whole.mask
    return jnp.asarray(x), jnp.asarray(dy), jnp.asarray(case.padded(mask, False))


@functools.cache
def compiled(kind: str, names, has_mask: bool):
    """Return the jitted forward and backward; cases of equal layers and shapes share its cache."""

    def both(layer, x, dy, *mask):
        def forward(layer, x):
            return over_shards(kind, lambda layer, *a: layer(*a), names)(layer, x, *mask)

        y, pullback = jax.vjp(forward, layer, x)
        grads, dx = pullback(dy)
        return y, dx, grads.scale, grads.bias

    return jax.jit(both)


def run_case(kind: str, case: Case, names=("shards",)) -> None:
    x, dy, mask = stacked(case)
    layer = make_layer(case, names if len(names) > 1 else names[0])
    both = compiled(kind, names, mask is not None)
    y, dx, dscale, dbias = both(layer, x, dy, *(() if mask is None else (mask,)))
    assert np.isfinite(y).all()
    check(
        case,
        case.unpadded(np.asarray(y)),
        case.unpadded(np.asarray(dx)),
        np.asarray(dscale),
        np.asarray(dbias),
    )


# A compilation costs a second: all cases in the map that checks most, some in the others.
EVERYWHERE = {
    "even",
    "a shard fully masked",
    "offset 100000",
    "index groups: two pairs",
    "index groups: one and three, masked, exact",
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, id=f"{kind}-{case}")
        for kind in MAPS
        for case in cases(SHARDS)
        if kind == "shard_map" or case.name in EVERYWHERE
    ],
)
def test_equals_the_whole(kind, case):
    run_case(kind, case)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["shard_map", "shard_map unchecked", "vmap"])
def test_tuple_of_axis_names(kind, fast):
    case = Case("tuple of names", (5, 2, 3, 1), "shard 1", 100.0, fast)
    run_case(kind, case, ("rows", "columns"))


def test_one_of_two_mapped_axes_pools_over_that_one_alone():
    pairs = Case("two meshes", (3, 3, 3, 3), index_groups=((0, 1), (2, 3)))
    x, _, _ = stacked(pairs)
    layer = make_layer(Case("two meshes", (3, 3, 3, 3)), "columns")
    y = jax.jit(over_shards("shard_map", lambda layer, x: layer(x), ("rows", "columns")))(layer, x)
    assert_close(pairs.unpadded(np.asarray(y)), data(pairs).y, tolerance=CONTRACT)


@pytest.mark.parametrize("kind", MAPS)
def test_gradient_taken_inside_the_map(kind):
    """Parameter gradients are a shard's share, but under check_vma=True JAX itself sums them."""
    case = Case("gradient inside", (5, 2, 3, 1), "at random")
    x, dy, mask = stacked(case)

    def loss(layer, x, dy, mask):
        return (layer(x, mask) * dy).sum()

    gradients = jax.jit(over_shards(kind, jax.grad(loss, argnums=(0, 1))))
    grads, dx = gradients(make_layer(case), x, dy, mask)
    whole = data(case).gradients
    for got, want in ((grads.scale, whole.scale), (grads.bias, whole.bias)):
        if kind == "shard_map":
            for on_shard in np.asarray(got):
                assert_gradient(on_shard, want, rtol=4e-6)
        else:
            assert_gradient(np.asarray(got, dtype=np.float64).sum(axis=0), want, rtol=4e-6)
    assert_gradient(case.unpadded(np.asarray(dx)), whole.x, rtol=2e-6)


@pytest.mark.parametrize("kind", MAPS)
def test_loss_summed_inside_the_map(kind):
    """JAX's own convention, which README states: where it cannot check, every shard has a loss.

    All of them depend on every x, and jax.grad adds them up. Under check_vma=True it knows that
    they are one.
    """
    case = Case("loss inside", (5, 2, 3, 1), "at random")
    x, dy, mask = stacked(case)

    def loss(x, layer, dy, mask):
        return jax.lax.psum((layer(x, mask) * dy).sum(), "shards")

    def gradient(layer, x, dy, mask):
        return jax.grad(loss)(x, layer, dy, mask)

    dx = jax.jit(over_shards(kind, gradient))(make_layer(case), x, dy, mask)
    times = 1 if kind == "shard_map" else SHARDS
    assert_gradient(case.unpadded(np.asarray(dx)), times * data(case).gradients.x, rtol=2e-6)


@pytest.mark.parametrize("kind", MAPS)
def test_function_with_traced_parameters(kind):
    """Not compiled, in which shard_map compiles each operation: many seconds."""
    case = Case("function", (3, 3, 3, 3))
    whole = data(case)

    def function(parameters, x):
        return group_norm(x, *parameters, axis_name="shards", **case.keywords)

    y = over_shards(kind, function)((whole.scale, whole.bias), stacked(case)[0])
    assert_close(case.unpadded(np.asarray(y)), whole.y, tolerance=CONTRACT)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", MAPS)
def test_statistics_of_small_floats_travel_in_float32(kind, name):
    case = Case(name, (64, 64, 64, 64), offset=3.0)
    x = stacked(case)[0].astype(name)
    layer = GroupNorm(CHANNELS, backend="jax", axis_name="shards", dtype="input", **case.keywords)
    mapped = over_shards(kind, lambda layer, x: layer(x))
    y = jax.jit(mapped)(layer, x)
    assert y.dtype == name
    wide = case.unpadded(np.asarray(x, dtype=np.float64))
    want = oracle.group_norm(wide, num_groups=NUM_GROUPS)
    # Rounded to the dtype, and within one unit in the last place more.
    error = np.abs(case.unpadded(np.asarray(y, dtype=np.float64)) - want)
    last_place = float(jnp.finfo(name).eps)
    assert (error <= 1.5 * last_place * np.maximum(np.abs(want), 1e-2)).all()
    pooled = re.findall(r"(\S+) = psum\w*\[", str(jax.make_jaxpr(mapped)(layer, x)))
    assert pooled
    assert not [result for result in pooled if "f16" in result]


@pytest.mark.parametrize(("fast", "most"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("kind", ["shard_map", "shard_map unchecked"])
def test_number_of_collectives(kind, fast, most):
    case = Case("collectives", (3, 3, 3, 3), fast=fast)
    x, dy, _ = stacked(case)
    forward = over_shards(kind, lambda layer, x: layer(x))

    def backward(layer, x, dy):
        return jax.vjp(functools.partial(forward, layer), x)[1](dy)[0]

    def reductions(function, *arguments):
        text = jax.jit(function).lower(*arguments).compile().as_text()
        return len(re.findall(r" = \S.* all-reduce(?:-start)?\(", text))

    layer = make_layer(case)
    assert 1 <= reductions(forward, layer, x) <= most
    assert 1 <= reductions(backward, layer, x, dy) <= most + 1


@pytest.mark.parametrize("compiler", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_axis_name_bound_nowhere(compiler):
    layer = GroupNorm(CHANNELS, num_groups=NUM_GROUPS, backend="jax", axis_name="nowhere")
    with pytest.raises(AxisNameError, match="nowhere") as caught:
        compiler(lambda x: layer(x))(jnp.ones((2, CHANNELS)))
    assert isinstance(caught.value, NameError)
    with pytest.raises(AxisNameError, match="elsewhere"):
        compiler(lambda x: group_norm(x, num_groups=2, axis_name=("nowhere", "elsewhere")))(
            jnp.ones((2, CHANNELS))
        )


def test_layer_with_axis_name_is_made_copied_and_converted_outside_a_map():
    layer = GroupNorm(CHANNELS, num_groups=NUM_GROUPS, backend="jax", axis_name="shards")
    same = jax.tree.map(lambda a: a + 1, layer)
    assert same.axis_name == "shards"
    np.testing.assert_array_equal(same.scale, np.full(CHANNELS, 2))


@pytest.mark.parametrize(
    "groups",
    [[[0, 1], [1, 2, 3]], [[0, 1], [2, 7]], [[0, 1], [2]], [[0, -1], [1, 2, 3]]],
    ids=str,
)
@pytest.mark.parametrize("kind", MAPS)
def test_wrong_index_groups(kind, groups):
    def make_and_call():
        keywords = {"axis_name": "shards", "axis_index_groups": groups}
        layer = GroupNorm(CHANNELS, num_groups=NUM_GROUPS, backend="jax", **keywords)
        mapped = jax.jit(over_shards(kind, lambda layer, x: layer(x)))
        mapped(layer, jnp.ones((SHARDS, 2, 3, CHANNELS)))

    with pytest.raises(ArgumentValueError, match="axis_index_groups"):
        make_and_call()


@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P(None, None, "d")], ids=str)
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_sharded_array_needs_no_axis_name(spec, explicit, rng):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((SHARDS,), ("d",), axis_types=(kind,))
    x = rng.normal(size=(4, 8, 16)).astype(np.float32) + 1e3
    layer = GroupNorm(16, num_groups=8, backend="jax")
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: layer(x))(jax.device_put(x, NamedSharding(mesh, spec)))
    want = oracle.group_norm(x, num_groups=8)
    assert_close(np.asarray(y), want, tolerance=CONTRACT)
