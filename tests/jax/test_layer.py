"""The JAX layer as a pytree: what JAX's transformations do with it."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from groupnorm import GroupNorm, group_norm
from groupnorm.errors import ArgumentTypeError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient

CHANNELS, GROUPS = 8, 4


def make(rng, **keywords) -> GroupNorm:
    """A layer whose parameters differ from channel to channel."""
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="jax", **keywords)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), layer)


def array(rng, *shape, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


def expected(layer, x, **keywords) -> np.ndarray:
    scale, bias = (None if p is None else np.asarray(p) for p in (layer.scale, layer.bias))
    return oracle.group_norm(np.asarray(x), scale, bias, num_groups=GROUPS, **keywords)


def expected_gradients(layer, x, dy, **keywords) -> oracle.Gradients:
    x, dy, scale, bias = (np.asarray(a) for a in (x, dy, layer.scale, layer.bias))
    return oracle.group_norm_gradients(x, dy, scale, bias, num_groups=GROUPS, **keywords)


def assert_equals_oracle(layer, x, y) -> None:
    assert isinstance(y, jax.Array)
    assert y.dtype == jnp.float32
    assert_close(np.asarray(y), expected(layer, x), tolerance=2 * CONTRACT)


def weighted(layer, x, dy):
    return (layer(x) * dy).sum()


def check_conversion(param_type, rng):
    """Convert a layer to another backend and back: its parameters are of this type again."""
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="jax", param_type=param_type)
    layer.scale, layer.bias = array(rng, CHANNELS), array(rng, CHANNELS)
    assert isinstance(layer.scale, jax.Array)
    host = layer.to_backend("numpy")
    np.testing.assert_array_equal(host.scale, layer.scale)
    back = host.to_backend("jax", param_type=param_type)
    np.testing.assert_array_equal(back.bias, layer.bias)
    leaves = jax.tree.leaves(back, is_leaf=lambda leaf: isinstance(leaf, param_type))
    assert [type(leaf) for leaf in leaves] == [param_type, param_type]


def test_leaves_are_scale_and_bias(rng):
    layer = make(rng)
    assert isinstance(layer, GroupNorm)
    leaves = jax.tree.leaves(layer)
    assert len(leaves) == 2
    assert leaves[0] is layer.scale
    assert leaves[1] is layer.bias
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(layer)]
    assert paths == [".scale", ".bias"]
    for keywords, count in (({"use_bias": False}, 1), ({"use_bias": False, "use_scale": False}, 0)):
        assert len(jax.tree.leaves(make(rng, **keywords))) == count


def test_tree_map_keeps_the_options(rng):
    layer = make(rng, epsilon=0.5, use_fast_variance=False, reduction_axes=(1, 2))
    doubled = jax.tree.map(lambda a: 2 * a, layer)
    assert type(doubled) is type(layer)
    assert repr(doubled) == repr(layer)
    np.testing.assert_array_equal(doubled.scale, 2 * layer.scale)
    np.testing.assert_array_equal(doubled.bias, 2 * layer.bias)
    x = array(rng, 2, 5, CHANNELS)
    np.testing.assert_allclose(doubled(x), 2 * layer(x), rtol=1e-6)


def test_flattening_takes_anything_as_a_leaf(rng):
    """Transformations put objects, None and shapes where arrays were: nothing is checked there."""
    layer = make(rng)
    structure = jax.tree.structure(layer)
    assert jax.tree.structure(jax.tree.unflatten(structure, [object(), "bias"])) == structure
    shapes = jax.eval_shape(lambda layer: layer, layer)
    assert (shapes.scale.shape, shapes.bias.dtype) == ((CHANNELS,), jnp.float32)
    assert jax.tree.map(lambda a: a.ndim, layer).scale == 1


def counted_call():
    """Return a compiled call of a layer, and the list of the layers it was compiled for."""
    traces = []

    @jax.jit
    def call(layer, x):
        traces.append(layer)
        return layer(x)

    return call, traces


def test_equal_layers_share_one_compilation(rng):
    call, traces = counted_call()
    x = array(rng, 2, 5, CHANNELS)
    first, second = make(rng), make(rng)
    assert_equals_oracle(first, x, call(first, x))
    assert_equals_oracle(second, x, call(second, x))
    assert len(traces) == 1
    call(make(rng, epsilon=0.5), x)
    call(make(rng, use_fast_variance=False), x)
    assert len(traces) == 3


@pytest.mark.parametrize("keywords", [{}, {"use_fast_variance": False}], ids=str)
@pytest.mark.parametrize("compiler", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_gradients_of_layer_and_input(compiler, keywords, rng):
    layer, x, dy = (
        make(rng, **keywords),
        array(rng, 3, 4, 5, CHANNELS),
        array(rng, 3, 4, 5, CHANNELS),
    )
    grads, dx = compiler(jax.grad(weighted, argnums=(0, 1)))(layer, x, dy)
    assert jax.tree.structure(grads) == jax.tree.structure(layer)
    want = expected_gradients(layer, x, dy)
    assert_gradient(np.asarray(dx), want.x, rtol=GRADIENT)
    assert_gradient(np.asarray(grads.scale), want.scale, rtol=GRADIENT)
    assert_gradient(np.asarray(grads.bias), want.bias, rtol=GRADIENT)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_derivatives_of_first_and_second_order(masked, fast, rng):
    """check_grads compares forward and reverse mode, and one after the other, with differences."""
    with jax.enable_x64(True):
        layer = make(rng, use_fast_variance=fast, param_dtype="float64")
        x = array(rng, 2, 3, CHANNELS, dtype=jnp.float64)
        mask = np.array([[True, True, False], [True, False, True]])[..., None] if masked else None

        @jax.jit
        def function(scale, bias, x):
            return jax.tree.unflatten(jax.tree.structure(layer), (scale, bias))(x, mask=mask)

        check_grads(
            function,
            (layer.scale, layer.bias, x),
            order=2,
            modes=("fwd", "rev"),
            atol=1e-5,
            rtol=1e-5,
        )


def test_gradient_of_gradient_and_hessian_vector_product(rng):
    with jax.enable_x64(True):
        layer = make(rng, param_dtype="float64")
        x, v, dy = (array(rng, 2, 3, CHANNELS, dtype=jnp.float64) for _ in range(3))

        def loss(x):
            return (layer(x) ** 3 * dy).sum()

        forward_over_reverse = jax.jvp(jax.grad(loss), (x,), (v,))[1]
        reverse_over_reverse = jax.grad(lambda x: (jax.grad(loss)(x) * v).sum())(x)
        step = 1e-5
        numerical = (jax.grad(loss)(x + step * v) - jax.grad(loss)(x - step * v)) / (2 * step)
        np.testing.assert_allclose(forward_over_reverse, numerical, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(reverse_over_reverse, forward_over_reverse, atol=1e-10)


def test_jvp_is_the_transpose_of_vjp(rng):
    layer, x = make(rng), array(rng, 2, 5, CHANNELS)
    tangent, dy = array(rng, *x.shape), array(rng, *x.shape)
    y, dot = jax.jvp(layer, (x,), (tangent,))
    assert_equals_oracle(layer, x, y)
    want = (expected_gradients(layer, x, dy).x * np.asarray(tangent, np.float64)).sum()
    np.testing.assert_allclose(np.asarray(dot * dy, np.float64).sum(), want, rtol=1e-5)


def test_vmap_over_x(rng):
    layer, x = make(rng), array(rng, 4, 2, 5, CHANNELS)
    for one, y in zip(x, jax.vmap(layer)(x), strict=True):
        assert_equals_oracle(layer, one, y)
    moved = jax.vmap(layer, in_axes=2, out_axes=1)(jnp.moveaxis(x, 0, 2))
    for one, y in zip(x, jnp.moveaxis(moved, 1, 0), strict=True):
        assert_equals_oracle(layer, one, y)


def test_vmap_over_layers(rng):
    layers, x = [make(rng) for _ in range(3)], array(rng, 2, 5, CHANNELS)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    got = jax.vmap(lambda layer: layer(x))(together)
    for layer, y in zip(layers, got, strict=True):
        assert_equals_oracle(layer, x, y)
    both = jax.vmap(lambda layer, x: layer(x))(together, jnp.stack([x, x + 1, 2 * x]))
    for layer, one, y in zip(layers, (x, x + 1, 2 * x), both, strict=True):
        assert_equals_oracle(layer, one, y)


def test_scan_over_layers(rng):
    layers, x = [make(rng) for _ in range(3)], array(rng, 2, 5, CHANNELS)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    last, _ = jax.lax.scan(lambda x, layer: (layer(x), None), x, together)
    want = x
    for layer in layers:
        want = expected(layer, want)
    assert_close(np.asarray(last), want, tolerance=4 * CONTRACT)


@pytest.mark.needs("optax")
def test_optax_trains_the_layer(rng):
    import optax

    layer, goal = make(rng), make(rng)
    x = array(rng, 4, 6, CHANNELS)
    target = goal(x)
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(layer, state):
        loss, grads = jax.value_and_grad(lambda layer: ((layer(x) - target) ** 2).mean())(layer)
        updates, state = optimizer.update(grads, state, layer)
        return optax.apply_updates(layer, updates), state, loss

    state, losses = optimizer.init(layer), []
    for _ in range(300):
        layer, state, loss = step(layer, state)
        losses.append(float(loss))
    assert losses[-1] < 1e-3 * losses[0]
    np.testing.assert_allclose(layer.scale, goal.scale, atol=0.05)


@pytest.mark.parametrize("how", [lambda a: pickle.loads(pickle.dumps(a)), copy.copy, copy.deepcopy])
def test_copies(how, rng):
    layer, x = make(rng, epsilon=0.1), array(rng, 2, 5, CHANNELS)
    other = how(layer)
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    assert jax.tree.structure(other) == jax.tree.structure(layer)
    np.testing.assert_array_equal(other(x), layer(x))


def test_pickle_is_read_where_jax_was_not_imported(rng, tmp_path):
    """The class is found by its module's name, and registers itself when that is imported."""
    import subprocess
    import sys

    layer, file = make(rng), tmp_path / "layer"
    file.write_bytes(pickle.dumps(layer))
    program = (
        "import pickle, sys; layer = pickle.load(open(sys.argv[1], 'rb')); import jax;"
        "print(float(sum(leaf.sum() for leaf in jax.tree.leaves(layer))))"
    )
    command = [sys.executable, "-c", program, str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    want = float(sum(leaf.sum() for leaf in jax.tree.leaves(layer)))
    np.testing.assert_allclose(float(out), want, rtol=1e-6)


def test_repr(rng):
    text = repr(make(rng, epsilon=0.1))
    for part in ("GroupNorm", "8", "num_groups=4", "epsilon=0.1", "backend='jax'"):
        assert part in text
    # Also while JAX holds tracers in it.
    seen = []
    jax.jit(lambda layer: seen.append(repr(layer)))(make(rng))
    assert "GroupNorm" in seen[0]


def test_mask_and_its_gradients(rng):
    layer, dy = make(rng), array(rng, 2, 6, CHANNELS)
    mask = np.array([[True] * 6, [True] * 2 + [False] * 4])[..., None]
    x = jnp.where(mask, array(rng, 2, 6, CHANNELS), jnp.nan)
    y = jax.jit(layer)(x, jnp.asarray(mask))
    assert_close(np.asarray(y), expected(layer, x, mask=mask), tolerance=2 * CONTRACT)
    grads, dx = jax.grad(lambda layer, x: (layer(x, mask) * dy).sum(), argnums=(0, 1))(layer, x)
    want = expected_gradients(layer, x, dy, mask=mask)
    assert_gradient(np.asarray(dx), want.x, rtol=GRADIENT)
    assert_gradient(np.asarray(grads.scale), want.scale, rtol=GRADIENT)
    np.testing.assert_array_equal(layer.update(x, mask=mask), layer(x, mask))


@pytest.mark.parametrize(
    ("library", "name"),
    [("numpy", "NumPy"), pytest.param("torch", "PyTorch", marks=pytest.mark.needs("torch"))],
)
def test_foreign_array(library, name, rng):
    x = np.ones((2, CHANNELS), np.float32)
    if library == "torch":
        import torch

        x = torch.from_numpy(x)
    with pytest.raises(ArgumentTypeError) as caught:
        make(rng)(x)
    for word in (name, "JAX", "to_backend"):
        assert word in str(caught.value)


def test_function_differentiates_like_the_layer(rng):
    layer, x, dy = make(rng), array(rng, 2, 5, CHANNELS), array(rng, 2, 5, CHANNELS)

    def loss(x, scale, bias):
        return (group_norm(x, scale, bias, num_groups=GROUPS) * dy).sum()

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, layer.scale, layer.bias)
    want = expected_gradients(layer, x, dy)
    for g, w in zip(got, want, strict=True):
        assert_gradient(np.asarray(g), w, rtol=GRADIENT)


def test_checks_cost_nothing_under_jit(rng):
    """No host callback, no value-dependent check: plain XLA, or one call of a kernel."""
    layer, x = make(rng), array(rng, 2, 5, CHANNELS)
    text = jax.jit(layer).lower(x, jnp.ones((2, 5, 1), bool)).as_text()
    assert "callback" not in text
    kernels = text.count("@groupnorm_cpu_1(")
    assert text.count("custom_call") == kernels <= 1


def test_made_outside_the_map_its_axis_name_is_of():
    """linen: cannot be initialised."""
    layer = GroupNorm(6, num_groups=3, backend="jax", axis_name="devices")
    assert layer.axis_name == "devices"
    assert layer.scale.shape == (6,)


def test_replicas_without_a_valid_element_keep_the_digits_of_what_is_masked_out(rng):
    x = (1e5 + rng.normal(size=(2, 1, 30, 8))).astype(np.float32)
    mask = np.zeros((2, 1, 30, 1), bool)
    mask[0, :, :20] = True  # the second replica has none
    layer = GroupNorm(8, num_groups=2, axis_name="i", backend="jax")
    got = jax.vmap(layer, axis_name="i")(jnp.asarray(x), jnp.asarray(mask))
    whole = np.concatenate(list(x), axis=1)
    want = oracle.group_norm(whole, num_groups=2, mask=np.concatenate(list(mask), axis=1))
    error = np.abs(np.concatenate(list(np.asarray(got)), axis=1) - want)
    assert (error <= 5e-6 * np.maximum(1, np.abs(want))).all()


def test_initializers_are_no_part_of_a_layer(rng):
    """Equal layers have equal trees, whatever made their values, and share a compilation."""
    sizes = (CHANNELS, (CHANNELS,), [CHANNELS], np.int64(CHANNELS), np.array([CHANNELS]))
    layers = [
        GroupNorm(size, num_groups=GROUPS, backend="jax", scale_init=init, bias_init=init)
        for size in sizes
        for init in (jax.nn.initializers.constant(0.5), lambda shape, dtype: np.ones(shape, dtype))
    ]
    call, traces = counted_call()
    x = array(rng, 2, 5, CHANNELS)
    for layer in layers:
        assert jax.tree.structure(layer) == jax.tree.structure(layers[0])
        mixed = jax.tree.map(lambda a, b: a + b, layer, layers[0])
        np.testing.assert_array_equal(mixed.scale, layer.scale + 0.5)
        assert_equals_oracle(layer, x, call(layer, x))
    assert len(traces) == 1
    other = GroupNorm(CHANNELS, num_groups=GROUPS, backend="jax", epsilon=0.5)
    assert jax.tree.structure(other) != jax.tree.structure(layers[0])


#: Pairs of one layer's arguments, written in two ways.
SPELLINGS = {
    "groups by number or size": (
        (8,),
        {"num_groups": 4},
        (8,),
        {"num_groups": None, "group_size": 2},
    ),
    "numpy integers": (
        (8, -1, 4),
        {},
        (np.int64(8), np.int8(-1)),
        {"num_groups": None, "group_size": np.uint8(2)},
    ),
    "feature axis from either end": (((3, 8),), {"num_groups": 4}, ([3, 8], 1), {"num_groups": 4}),
    "feature axis in a tuple": ((8,), {"num_groups": 4}, (8, (0,)), {"num_groups": 4}),
    "feature axes in any order": (
        ((2, 3, 4), (0, 2)),
        {"num_groups": 4},
        (np.array([2, 3, 4]), [-1, -3]),
        {"num_groups": None, "group_size": 2},
    ),
    "channels first": (
        ((8, ...), 0),
        {"num_groups": 4},
        ([8, ...], (-2,)),
        {"num_groups": None, "group_size": 2},
    ),
    "reduction axes in any order": (
        (8,),
        {"num_groups": 4, "reduction_axes": (1, -1)},
        (8,),
        {"num_groups": 4, "reduction_axes": [-1, 1]},
    ),
    "epsilon and dtypes": (
        (8,),
        {"num_groups": 4, "epsilon": 1, "dtype": "float32", "param_dtype": "bfloat16"},
        (8,),
        {"num_groups": 4, "epsilon": 1.0, "dtype": np.float32, "param_dtype": jnp.bfloat16},
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_layers_written_in_two_ways_are_equal(spelling, rng):
    """They have one tree, share a compilation, and say the same of themselves."""
    size, keywords, other_size, other_keywords = SPELLINGS[spelling]
    one = GroupNorm(*size, backend="jax", **keywords)
    other = GroupNorm(*other_size, backend="jax", **other_keywords)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(other))
    assert (one.num_groups, one.group_size) == (other.num_groups, other.group_size) == (4, 2)
    assert one.in_size == other.in_size
    call, traces = counted_call()
    features = one.scale.shape
    shape = {1: (2, 8, 5) if ... in one.in_size else (2, 5, 3, 8), 2: (3, 2, 5, 4)}[len(features)]
    x = array(rng, *shape)
    y, y2 = call(one, x), call(other, x)
    assert len(traces) == 1
    np.testing.assert_array_equal(y, y2)
    axes = {1: 1 if ... in one.in_size else 3, 2: (1, 3)}[len(features)]
    reduction = None if one.reduction_axes is None else (1, 3)
    want = oracle.group_norm(
        np.asarray(x),
        num_groups=4,
        feature_axis=axes,
        reduction_axes=reduction,
        epsilon=one.epsilon,
    )
    assert_close(np.asarray(y), want, tolerance=2 * CONTRACT)
    # repr is the constructor call of an equal layer.
    for layer in (one, other):
        again = eval(repr(layer), {"GroupNorm": GroupNorm})
        assert jax.tree.structure(again) == jax.tree.structure(one)


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_groups": 2},
        {"num_groups": None, "group_size": 4},
        {"in_size": (5, 8)},
        {"feature_axis": 0, "in_size": (8, ...)},
        {"reduction_axes": (1, 2, -1)},
        {"use_bias": False},
        {"param_dtype": "float16"},
        {"activation": "relu"},
    ],
    ids=str,
)
def test_other_layers_differ(keywords):
    base = GroupNorm(in_size=8, num_groups=4, backend="jax")
    other = GroupNorm(**{"in_size": 8, "num_groups": 4, "backend": "jax"} | keywords)
    assert jax.tree.structure(base) != jax.tree.structure(other)
