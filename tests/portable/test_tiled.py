"""`GroupStatistics`: measured on tiles, merged in any order, and applied to each tile."""

import functools
import importlib
import itertools

import array_api_compat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupnorm import GroupStatistics, group_statistics, merge_statistics, normalize
from groupnorm.errors import ArgumentTypeError as Type
from groupnorm.errors import ArgumentValueError as Value
from groupnorm.testing import oracle
from tests.portable.test_dtypes import TOLERANCE, assert_rounded, draw, skip_unless
from tests.portable.test_masks import poison, random_mask
from tests.rows import (
    CONTRACT,
    GRADIENT,
    GRADIENT_FAR,
    ROWS,
    assert_close,
    assert_gradient,
    check_array,
    default_float,
)

SHAPE = (2, 9, 5, 8)
OFFSETS = (0.0, 1e3, 1e5)
GROUPS = 4
DTYPES = ["float16", "bfloat16", "float64", "complex64", "complex128", "uint8", "int32"]
ORDERS = {
    "in order": merge_statistics,
    "reversed": lambda *parts: merge_statistics(*parts[::-1]),
    "one by one": lambda *parts: functools.reduce(merge_statistics, parts),
    "nested": lambda a, *rest: merge_statistics(merge_statistics(*rest[::-1]), merge_statistics(a)),
}


def cut(a, axis, cuts=None):
    """Cut an array of any library into tiles, by default of n - 4, 0, 1 and 3 rows."""
    n = a.shape[axis]
    cuts = (n - 4, n - 4, n - 3) if cuts is None else cuts
    # Every axis is indexed, as array_api_strict requires.
    before, after = [slice(None)] * axis, [slice(None)] * (a.ndim - axis - 1)
    ends = zip((0, *cuts), (*cuts, n), strict=True)
    return [a[*before, slice(*pair), *after] for pair in ends]


def by_tiles(
    x, scale=None, bias=None, mask=None, *, axis=1, merge=merge_statistics, epsilon=1e-6, **keywords
):
    """Return the merged statistics, and the concatenated tiles normalized by them."""
    tiles = cut(x, axis)
    masks = [None] * len(tiles) if mask is None else cut(mask, axis)
    pairs = list(zip(tiles, masks, strict=True))
    whole = merge(*(group_statistics(tile, mask=m, **keywords) for tile, m in pairs))
    ys = [normalize(t, whole, scale, bias, mask=m, epsilon=epsilon, **keywords) for t, m in pairs]
    return whole, array_api_compat.array_namespace(x).concat(ys, axis=axis)


def varied(rng, offset=0.0, axis=1, shape=SHAPE):
    """Return an array whose tiles have different means, as those of an image do."""
    slope = np.linspace(-1, 2, shape[axis]).reshape(-1, *[1] * (len(shape) - axis - 1))
    return (offset + slope + rng.normal(size=shape)).astype(np.float32)


def parameters(rng, channels=SHAPE[-1]):
    scale = rng.uniform(0.5, 1.5, size=channels).astype(np.float32)
    return scale, rng.normal(size=channels).astype(np.float32)


def measure(x, mask=None, *, num_groups, feature_axis=-1, reduction_axes=None, epsilon=0.0):
    """Return count, mean and variance in float64, of shape (kept axes, groups); for any epsilon."""
    axes = (feature_axis, reduction_axes)
    x, valid, features, wheres = oracle.prepare(x, mask, num_groups, None, *axes)
    default = oracle.default_reduction(x.ndim, features)
    reduced = default if reduction_axes is None else oracle.as_axes(reduction_axes, x.ndim)
    rows = []
    for where in wheres:
        values = x[where][valid[where]]
        mean = oracle.exact_sum(values) / values.size if values.size else 0.0
        square = oracle.exact_sum(np.abs(values - mean) ** 2)
        rows.append((values.size, mean, square / values.size if values.size else 1.0))
    kept = [n for axis, n in enumerate(x.shape) if axis not in reduced]
    fields = [np.array(field).reshape(num_groups, *kept) for field in zip(*rows, strict=True)]
    return [np.moveaxis(field, 0, -1) for field in fields]


def assert_statistics(backend, got, want, *, dtype="float32", tolerance=CONTRACT):
    """Assert the mean relative to the group's spread, whatever its offset, and the variance."""
    assert isinstance(got, GroupStatistics)
    count, mean, variance = want
    real = {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)
    with np.errstate(over="ignore", under="ignore"):
        of_got = got.variance
    for field, kind in zip((*got, of_got), [real, dtype, real, dtype, real, real], strict=True):
        check_array(backend, field, shape=count.shape, dtype=kind)
    host = GroupStatistics(*(oracle.widen(backend.to_numpy(a)) for a in got))
    np.testing.assert_array_equal(host.count, count)
    spread = np.where(count > 0, np.sqrt(variance), 0)
    rounding = 4 * np.finfo(np.float64).eps * np.abs(mean)
    error = np.abs(host.mean + host.residual / host.unit - mean)
    assert (error <= tolerance * spread + rounding).all(), error.max()
    # `mean` without `residual` is the nearest floating-point value or one next to it.
    rounding = np.finfo(dtype).eps * np.abs(mean)
    assert (np.abs(host.mean - mean) <= tolerance * spread + rounding).all()
    # The variance in float64, and in float32 if it is in its range.
    held = (variance == 0) | ((variance > 1e-37) & (variance < 1e38))
    wide = np.where(count > 0, host.m2 / np.maximum(count, 1) / host.unit**2, 1)
    for values, where in ((wide, ...), (oracle.widen(backend.to_numpy(of_got)), held)):
        error = np.abs(values - variance)[where]
        assert (error <= tolerance * variance[where]).all(), error


def assert_tiles(backend, whole, y, x, scale=None, bias=None, **keywords):
    """Compare the result of `by_tiles` for float32 with the whole array."""
    check_array(backend, y, shape=x.shape, dtype="float32")
    want = oracle.group_norm(x, scale, bias, **keywords)
    assert_close(backend.to_numpy(y), want, tolerance=CONTRACT)
    assert_statistics(backend, whole, measure(x, **keywords))


@pytest.mark.parametrize(("order", "feature_axis"), [*zip(ORDERS, [-1, 1, -1, 1], strict=True)])
def test_tiles_equal_the_whole(backend, feature_axis, order, rng):
    shape, axis = (SHAPE, 1) if feature_axis == -1 else ((2, 8, 9, 5), 2)
    keywords = {"num_groups": GROUPS, "feature_axis": feature_axis}
    more = {"axis": axis, "merge": ORDERS[order]}
    function = backend.compiled(functools.partial(by_tiles, **more, **keywords))
    for offset in OFFSETS:
        x, (scale, bias) = varied(rng, offset, axis, shape), parameters(rng)
        whole, y = function(*map(backend.asarray, (x, scale, bias)))
        assert_tiles(backend, whole, y, x, scale, bias, **keywords)


AXES = [  # feature axes, reduction axes, tiled axis; and the shape of the statistics
    (-1, (1, -1), 1, (2, 5, 4)),
    (1, (1, 3), 3, (2, 5, 3)),
    (-1, (0, 1, -1), 1, (5, 4)),
    ((1, 3), None, 2, (2, 4)),
    (-1, (0, 1, 2, 3), 2, (4,)),
]


@pytest.mark.parametrize(("features", "reduced", "axis", "shape"), AXES, ids=str)
def test_axes(backend, features, reduced, axis, shape, rng):
    """Axes that are not reduced are kept in order, followed by the groups."""
    keywords = {"num_groups": shape[-1], "feature_axis": features, "reduction_axes": reduced}
    function = backend.compiled(
        lambda x: (group_statistics(x, **keywords), *by_tiles(x, axis=axis, **keywords))
    )
    for offset in OFFSETS:
        x = varied(rng, offset)
        direct, whole, y = function(backend.asarray(x))
        assert tuple(direct.count.shape) == shape
        assert_statistics(backend, direct, measure(x, **keywords))
        assert_tiles(backend, whole, y, x, **keywords)


def padded(rng, offset=0.0):
    """Return an array and a mask that excludes the last tile and one whole group."""
    x, mask = varied(rng, offset), random_mask(rng, SHAPE)
    mask[:, -3:] = mask[1, ..., :2] = False
    return poison(x, mask), mask


def test_masked_tiles(backend, rng):
    function = backend.compiled(functools.partial(by_tiles, num_groups=GROUPS))
    for offset in OFFSETS:
        (x, mask), (scale, bias) = padded(rng, offset), parameters(rng)
        whole, y = function(*map(backend.asarray, (x, scale, bias, mask)))
        assert_tiles(backend, whole, y, x, scale, bias, num_groups=GROUPS, mask=mask)
        of_nothing = [float(a[1, 0]) for a in (whole.count, whole.mean, whole.variance)]
        assert of_nothing == [0, 0, 1]


def test_statistics_of_empty_parts(backend):
    """Statistics of an empty part have count 0, mean 0 and variance 1, also when merged."""
    x = backend.asarray(np.zeros((2, 0, 8), np.float32))
    part = group_statistics(x, num_groups=GROUPS)
    for got in (part, merge_statistics(part), merge_statistics(part, part)):
        want = np.zeros((2, GROUPS)), np.zeros((2, GROUPS)), np.ones((2, GROUPS))
        assert_statistics(backend, got, want)
    y = normalize(x, part, num_groups=GROUPS)
    check_array(backend, y, shape=(2, 0, 8), dtype="float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend, dtype, rng, needs_bfloat16):
    """Statistics of 16-bit input are float32, those of integers the library's default dtype."""
    skip_unless(backend, dtype)
    integers, low = "int" in dtype, dtype in ("float16", "bfloat16")
    x = rng.integers(0, 200, SHAPE).astype(dtype) if integers else draw(rng, dtype, SHAPE)
    result = default_float(backend) if integers else dtype
    inner = "float32" if low else result
    with backend.precision(dtype):
        function = backend.compiled(functools.partial(by_tiles, num_groups=GROUPS))
        whole, y = function(backend.asarray(x))
        check_array(backend, y, shape=SHAPE, dtype=result)
        values, want = backend.to_numpy(y), measure(x, num_groups=GROUPS)
        assert_statistics(backend, whole, want, dtype=inner, tolerance=TOLERANCE[inner])
    want = oracle.group_norm(x, num_groups=GROUPS)
    if low:
        assert_rounded(values, want, dtype)
    else:
        assert_close(values, want, tolerance=TOLERANCE[inner])


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_scales(backend, epsilon, rng):
    """Squares exceed float32's range, and tiles may differ by 40 orders of magnitude."""
    keywords = {"num_groups": GROUPS, "epsilon": epsilon}
    function = backend.compiled(functools.partial(by_tiles, **keywords))
    for scales, offset in itertools.product([1e20, 1e-20, (1e20, 1e-20, 1.0)], [0.0, 1e3]):
        factors = np.repeat(np.resize(scales, 3), 3)[:, None, None]
        x = (varied(rng, offset) * factors).astype(np.float32)
        whole, y = function(backend.asarray(x))
        assert_tiles(backend, whole, y, x, **keywords)


def test_constant_tiles_give_exactly_the_bias(backend, rng):
    scale, bias = parameters(rng)
    function = backend.compiled(functools.partial(by_tiles, num_groups=GROUPS))
    for value in (0.1, -12345.678, 1e20, 1e-20, 16777217.0):
        x = np.full(SHAPE, value, np.float32)
        whole, y = function(*map(backend.asarray, (x, scale, bias)))
        check_array(backend, y, shape=SHAPE, dtype="float32")
        np.testing.assert_array_equal(backend.to_numpy(y), np.broadcast_to(bias, SHAPE))
        np.testing.assert_array_equal(backend.to_numpy(whole.variance), np.zeros((2, GROUPS)))


def differentiate_on_the_host(backend, function, arrays, dy):
    """Differentiate function(x, scale, bias) with the library; return gradients on the host."""
    arrays, dy = [backend.asarray(a) for a in arrays], backend.asarray(dy)
    if backend.library == "jax":
        jax = importlib.import_module("jax")
        grads = jax.jit(lambda dy, *given: jax.vjp(function, *given)[1](dy))(dy, *arrays)
    elif backend.library == "mlx":
        _, grads = importlib.import_module("mlx.core").vjp(function, arrays, [dy])
    else:
        torch = importlib.import_module("torch")
        arrays = [a.requires_grad_() for a in arrays]
        grads = torch.autograd.grad(function(*arrays), arrays, dy)
    for gradient, array in zip(grads, arrays, strict=True):
        check_array(backend, gradient, shape=array.shape, dtype="float32")
    return [backend.to_numpy(a) for a in grads]


@pytest.mark.parametrize(
    ("offset", "masked", "order"),
    [(0.0, False, "one by one"), (1e3, False, "nested"), (0.0, True, "nested")],
)
def test_gradients_through_tiles(autodiff_backend, offset, masked, order, rng):
    x, mask = padded(rng, offset) if masked else (varied(rng, offset), None)
    dy, (scale, bias) = rng.normal(size=SHAPE).astype(np.float32), parameters(rng)
    passed = None if mask is None else autodiff_backend.asarray(mask)

    def function(x, scale, bias):
        return by_tiles(x, scale, bias, passed, merge=ORDERS[order], num_groups=GROUPS)[1]

    got = differentiate_on_the_host(autodiff_backend, function, (x, scale, bias), dy)
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=GROUPS, mask=mask)
    for gradient, reference in zip(got, want, strict=True):
        assert_gradient(gradient, reference, rtol=GRADIENT_FAR if offset else GRADIENT)


@pytest.mark.needs("jax")
def test_statistics_are_a_jax_pytree(rng):
    jax = importlib.import_module("jax")
    x = varied(rng, 1e3, shape=(3, *SHAPE), axis=2)
    first, second = x[:, :, :4], x[:, :, 4:]
    measured = jax.vmap(functools.partial(group_statistics, num_groups=GROUPS))
    a, b = jax.jit(measured)(first), jax.jit(measured)(second)
    assert len(jax.tree.leaves(a)) == 5
    assert isinstance(jax.tree.map(lambda leaf: leaf[0], a), GroupStatistics)
    whole = jax.jit(jax.vmap(merge_statistics))(a, b)
    applied = jax.jit(jax.vmap(functools.partial(normalize, num_groups=GROUPS)))
    y = jax.numpy.concat([applied(tile, whole) for tile in (first, second)], axis=2)
    for i, sample in enumerate(x):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], whole)
        assert_tiles(ROWS["jax"], one, y[i], sample, num_groups=GROUPS)


@pytest.mark.slow
@pytest.mark.needs("torch")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_torch_compiles_tiles_in_one_graph(rng):
    torch, backend = importlib.import_module("torch"), ROWS["torch"]
    torch._dynamo.reset()

    @functools.partial(torch.compile, fullgraph=True)
    def function(a, b):
        whole = merge_statistics(*(group_statistics(tile, num_groups=2) for tile in (a, b)))
        return whole, torch.cat([normalize(tile, whole, num_groups=2) for tile in (a, b)], dim=1)

    x = varied(rng, 1e3)
    whole, y = function(backend.asarray(x[:, :4]), backend.asarray(x[:, 4:]))
    torch._dynamo.reset()
    assert_tiles(backend, whole, y, x, num_groups=2)


@pytest.mark.parametrize("kind", ["numbers", "arrays", "float32 arrays"])
def test_user_constructed_statistics(backend, kind, rng):
    """From Python scalars or NumPy arrays, for any library; a float64 mean loses no digits."""
    x, (scale, bias) = varied(rng, 1e5), parameters(rng)
    made = GroupStatistics(40, 1e5 + 0.123456789, 90.0)
    if kind != "numbers":
        dtype = np.float32 if kind == "float32 arrays" else np.float64
        more = rng.uniform(0.5, 1, size=(2, 2, GROUPS))
        mean, m2 = ((a + b).astype(dtype) for a, b in zip(more, made[1:3], strict=True))
        made = GroupStatistics(np.full((2, GROUPS), 40), mean, m2)
    function = backend.compiled(lambda x, *rest: normalize(x, made, *rest, num_groups=GROUPS))
    y = function(*map(backend.asarray, (x, scale, bias)))
    check_array(backend, y, shape=SHAPE, dtype="float32")
    means, squares, counts = (
        np.broadcast_to(np.asarray(a, np.float64), (2, GROUPS)).repeat(2, axis=-1)[:, None, None]
        for a in (made.mean, made.m2, made.count)
    )
    want = (x.astype(np.float64) - means) / np.sqrt(squares / counts + 1e-6) * scale + bias
    assert_close(backend.to_numpy(y), want, tolerance=CONTRACT)


def test_merging_user_constructed_statistics():
    a = GroupStatistics(1, np.array([[1.0]]), 0.0)
    b = GroupStatistics(np.array([[3]]), np.array([[5.0]]), np.array([[6.0]]))
    want = [np.array([[v]]) for v in (4.0, 4.0, (6 + 9 + 3) / 4)]
    rules = {"dtype": "float64", "tolerance": TOLERANCE["float64"]}
    assert_statistics(ROWS["numpy"], merge_statistics(a, b), want, **rules)
    assert_statistics(ROWS["numpy"], merge_statistics(b, a), want, **rules)


def part(shape=(2, 8), num_groups=GROUPS, dtype=np.float32):
    return group_statistics(np.ones(shape, dtype), num_groups=num_groups)


MERGES = {
    "nothing": ((), Value, r"nothing to merge: pass at least one GroupStatistics"),
    "a tuple": ((part(), (1, 2)), Type, r"statistics\[1\] is of type tuple: it must be a Group"),
    "a list": (([part()],), Type, r"statistics\[0\] is of type list: it must be a GroupStat"),
    "groups": ((part(), part(num_groups=2)), Value, r"\[1\]\.mean has shape \(2, 2\) and .*\(2, 4"),
    "samples": ((part(), part((3, 8))), Value, r"s\[1\]\.mean has shape \(3, 4\) and .*\(2, 4"),
}


def test_statistics_of_two_libraries_raise(backend):
    if isinstance(backend.empty(), np.ndarray):
        pytest.skip("the second library in this test is NumPy")
    x = np.ones((2, 8), np.float32)
    other = group_statistics(backend.asarray(x), num_groups=GROUPS)
    names = {"torch": "PyTorch", "jax": "JAX", "cupy": "CuPy", "mlx": "MLX"}
    name = names.get(backend.library, backend.library)
    message = r"statistics\[0\] are of {} \w+ and statistics\[1\] of {} arrays: "
    with pytest.raises(Type, match=message.format("NumPy", name)):
        merge_statistics(part(), other)
    with pytest.raises(Type, match=message.format(name, "NumPy")):
        merge_statistics(other, part())
    with pytest.raises(Type, match=rf"x is of NumPy arrays and statistics\.\w+ of {name} arrays"):
        normalize(x, other, num_groups=GROUPS)


APPLICATIONS = {
    "a tuple": ((1, 2, 3), Type, r"statistics is of type tuple: it must be a GroupStatistics"),
    "groups": (part(num_groups=2), Value, r"\(2, 2\), and for x of .* it must be \(2, 4\)"),
    "samples": (part((3, 8)), Value, r"\(3, 4\), .* must be \(2, 4\): .* Pass the same num_groups"),
    "complex": (part(dtype="complex64"), Type, r"s\.mean is of complex64 and x is real: .* Pass"),
    "a complex number": (GroupStatistics(3, 1j, 2.0), Type, r"s\.mean is .* and x is real"),
}


@pytest.mark.parametrize(("parts", "error", "message"), MERGES.values(), ids=MERGES)
def test_invalid_arguments_of_merging(parts, error, message):
    with pytest.raises(error, match=message):
        merge_statistics(*parts)


@pytest.mark.parametrize(("made", "error", "message"), APPLICATIONS.values(), ids=APPLICATIONS)
def test_statistics_that_do_not_match_x_raise(made, error, message):
    with pytest.raises(error, match=message):
        normalize(np.ones((2, 8), np.float32), made, num_groups=GROUPS)


@given(data=st.data())
def test_any_split_in_any_order(data):
    """Any tiles, including empty ones, merged two or more at a time in any order."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    axis = data.draw(st.integers(0, len(shape) - 2))
    keywords = {"num_groups": shape[-1], "reduction_axes": range(len(shape))}
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    noise = data.draw(st.sampled_from([lambda: rng.normal(size=shape), lambda: np.zeros(shape)]))
    x = (data.draw(st.sampled_from([*OFFSETS, -1e5])) + noise()).astype(np.float32)
    mask = rng.random(shape) < data.draw(st.sampled_from([0.3, 0.8, 1.0]))
    x = poison(x, mask)
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[axis]), max_size=5)))
    tiles = zip(cut(x, axis, cuts), cut(mask, axis, cuts), strict=True)
    parts = [group_statistics(tile, mask=m, **keywords) for tile, m in tiles]
    parts = data.draw(st.permutations(parts))
    while len(parts) > 1:
        together = data.draw(st.integers(2, len(parts)))
        parts = [*parts[together:], merge_statistics(*parts[:together])]
    assert_statistics(ROWS["numpy"], parts[0], measure(x, mask, **keywords))


@pytest.mark.parametrize("kept", ["float32", "float64"])
def test_complex_data_with_statistics_of_real_data(kept, rng):
    """Nothing warns of an imaginary part: the mean has none."""
    x = rng.normal(size=(2, 30, 8)).astype(np.float32)
    given = GroupStatistics(*(np.asarray(a, kept) for a in group_statistics(x, num_groups=4)))
    z = (x + 1j * rng.normal(size=x.shape)).astype(np.complex64)
    y = normalize(z, given, num_groups=4)
    grouped = x.astype(np.float64).reshape(2, 30, 4, 2)
    mean, var = (f(grouped, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    want = (z.astype(np.complex128).reshape(grouped.shape) - mean) / np.sqrt(var + 1e-6)
    assert np.abs(y - want.reshape(x.shape)).max() <= CONTRACT * np.abs(want).max()
