"""Statistics as values: those of tiles, merged, normalize every tile as if it had not been cut."""

import functools
import itertools
import math

import numpy as np
import pytest

from groupnorm import GroupStatistics, group_norm, group_statistics, merge_statistics, normalize
from tests import oracle
from tests.backends import (
    CONTRACT,
    CONTRACT_64,
    Backend,
    assert_close,
    check_array,
    dtype_name,
    host_dtype,
)
from tests.test_accuracy import DATA, OFFSETS, constants, from_channels_last
from tests.test_dtypes import LOW, assert_rounded, skip_unless

SHAPE = (2, 9, 10, 8)


def grid(shape, cuts):
    """Return the tiles of an array, as indices; `cuts` says where which axes are cut."""
    along = []
    for axis, length in enumerate(shape):
        ends = (0, *cuts.get(axis, ()), length)
        along.append([slice(i, j) for i, j in itertools.pairwise(ends)])
    return list(itertools.product(*along))


def over_tiles(tiles, masks, scale=None, bias=None, *, merge=merge_statistics, **keywords):
    """Normalize in two passes; epsilon and dtype concern the second alone."""
    first = {k: v for k, v in keywords.items() if k not in ("epsilon", "dtype")}
    pairs = list(zip(tiles, masks, strict=True))
    whole = merge(*(group_statistics(tile, mask=mask, **first) for tile, mask in pairs))
    return [normalize(tile, whole, scale, bias, mask=mask, **keywords) for tile, mask in pairs]


def run_tiled(backend, x, tiles, scale=None, bias=None, *, mask=None, call=None, **keywords):
    """Return the output of `over_tiles` put together, its library, dtype and shapes checked."""
    given = [backend.asarray(x[tile]) for tile in tiles]
    masks = [None] * len(tiles)
    if mask is not None:
        full = np.broadcast_to(mask, x.shape)
        masks = [backend.asarray(full[tile]) for tile in tiles]
    parameters = [None if p is None else backend.asarray(p) for p in (scale, bias)]
    call = call or backend.transform(functools.partial(over_tiles, **keywords))
    results = call(given, masks, *parameters)
    name = dtype_name(results[0].dtype)
    y = np.empty(x.shape, host_dtype(name))
    for tile, part, out in zip(tiles, given, results, strict=True):
        check_array(backend, out, shape=part.shape, dtype=name)
        y[tile] = backend.to_numpy(out)
    return y


def draw(rng, shape=SHAPE, offset=1e3, axis=-1):
    x = (offset + rng.normal(size=shape)).astype(np.float32)
    sizes = [shape[a] for a in np.atleast_1d(axis)]
    scale = rng.uniform(0.5, 1.5, size=sizes).astype(np.float32)
    return x, scale, rng.normal(size=sizes).astype(np.float32)


def numbers(backend, statistics):
    """Return exact count, mean and variance: what the fields mean, in float64."""
    count, mean, m2, residual, unit = (
        oracle.widen(backend.to_numpy(field)) for field in statistics
    )
    return count, mean + residual / unit, m2 / unit / unit / np.maximum(count, 1)


# (feature axis, shape, cuts, whether masked): tiles of every size, some of them empty.
CONTRACT_CASES = {
    "last": (-1, (2, 16, 17, 16), {1: (7, 7), 2: (1,)}, False),
    "first, masked": (1, (2, 16, 16, 17), {2: (7, 7), 3: (1,)}, True),
}


@pytest.mark.parametrize("case", CONTRACT_CASES)
def test_the_accuracy_contract(backend, case, rng):
    """Every offset and kind of data, and under the mask a tile where nothing counts."""
    axis, shape, cuts, masked = CONTRACT_CASES[case]
    data = {f"offset {n:g}": lambda rng, s, n=n: n + rng.normal(size=s) for n in OFFSETS} | DATA
    keywords = {"num_groups": 4, "feature_axis": axis}
    tiles = grid(shape, cuts)
    mask = None
    if masked:
        mask = rng.random((2, 1, 16, 17)) < 0.7
        mask[tiles[-1]] = False
    call = backend.transform(functools.partial(over_tiles, **keywords))
    failures = []
    for name, make in data.items():
        x = from_channels_last(make(rng, (2, 16, 17, 16)).astype(np.float32), axis)
        y = run_tiled(backend, x, tiles, mask=mask, call=call)
        assert y.dtype == np.float32
        try:
            assert_close(y, oracle.group_norm(x, mask=mask, **keywords), tolerance=CONTRACT)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)


TILINGS = {
    "not cut": {},
    "two": {1: (4,)},
    "uneven": {1: (2, 3, 8)},
    "an empty one first": {2: (0, 6)},
    "an empty one last": {2: (3, 10)},
    "pixels": {1: range(1, 9), 2: range(1, 10)},
    "rows and columns": {1: (1, 5), 2: (3, 9)},
}


@pytest.mark.parametrize("offset", [0, 1e5])
@pytest.mark.parametrize("axis", [-1, 1], ids=["last", "first"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_every_tiling(quick_backend, tiling, axis, offset, rng):
    x, scale, bias = draw(rng, offset=offset)
    x = from_channels_last(x, axis)
    cuts = {a + (axis == 1): ends for a, ends in TILINGS[tiling].items()}
    keywords = {"num_groups": 4, "feature_axis": axis}
    y = run_tiled(quick_backend, x, grid(x.shape, cuts), scale, bias, **keywords)
    assert_close(y, oracle.group_norm(x, scale, bias, **keywords), tolerance=CONTRACT)


def tree(*parts):
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return merge_statistics(tree(*parts[:half]), tree(*parts[half:]))


MERGES = {
    "all at once": merge_statistics,
    "the last first": lambda *parts: merge_statistics(*reversed(parts)),
    "one by one": lambda *parts: functools.reduce(merge_statistics, parts),
    "one by one from the last": lambda *parts: functools.reduce(merge_statistics, parts[::-1]),
    "as a tree": tree,
    "shuffled": lambda *parts: merge_statistics(parts[3], tree(*parts[:3]), tree(*parts[4:])),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_any_order_and_association(quick_backend, merge, rng):
    """Tiles of different means and spreads, one of them empty, another constant."""
    x, scale, bias = draw(rng)
    tiles = grid(x.shape, {1: (1, 3, 3, 4, 8)})
    for i, tile in enumerate(tiles):
        x[tile] = 1e5 + 20 * i + i * rng.normal(size=x[tile].shape)
    y = run_tiled(quick_backend, x, tiles, scale, bias, num_groups=2, merge=merge)
    assert_close(y, oracle.group_norm(x, scale, bias, num_groups=2), tolerance=CONTRACT)


# Shapes of masks; tile 1 is masked out altogether by all of them but the last.
MASKS = {
    "positions": (2, 9, 10, 1),
    "rows": (9, 1, 1),
    "elements": SHAPE,
    "samples": (2, 1, 1, 1),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_masks(quick_backend, shape, rng):
    """NaN where nothing counts; sample 1 has no valid element in any tile where it can be so."""
    x, scale, bias = draw(rng)
    tiles = grid(SHAPE, {1: (4, 7)})
    mask = rng.random(shape) < 0.7
    if 9 in shape:
        np.moveaxis(mask, shape.index(9), 0)[4:7] = False
    if shape[0] == 2:
        mask[0], mask[1] = mask[0] | (shape == (2, 1, 1, 1)), False
    x = np.where(mask, x, np.float32(np.nan))
    y = run_tiled(quick_backend, x, tiles, scale, bias, mask=mask, num_groups=2)
    reference = oracle.group_norm(x, scale, bias, mask=mask, num_groups=2)
    assert np.isfinite(reference).all()
    assert_close(y, reference, tolerance=CONTRACT)


# What is given, and where to cut.
AXES = {
    "the features alone": ({"num_groups": 2, "reduction_axes": (-1,)}, {}),
    "a batch of tiles": ({"num_groups": 2, "reduction_axes": (0, 1, 2, 3)}, {0: (1,), 2: (4, 9)}),
    "the batch, no position": ({"num_groups": 2, "reduction_axes": (0, -1)}, {0: (1,)}),
    "columns kept": ({"num_groups": 2, "reduction_axes": (1, 3)}, {1: (4, 4, 6)}),
    "rows kept, features first": (
        {"num_groups": 3, "reduction_axes": (1, 3), "feature_axis": 1},
        {3: (2,)},
    ),
    "rows kept, features second": (
        {"num_groups": 5, "reduction_axes": (0, 2), "feature_axis": 2},
        {0: (1,)},
    ),
    "features on the leading axis": ({"num_groups": 2, "feature_axis": 0}, {2: (4,), 3: (1,)}),
    "two feature axes": ({"num_groups": 4, "feature_axis": (1, 3)}, {2: (4, 9)}),
    "two feature axes apart from a kept one": (
        {"num_groups": 4, "feature_axis": (0, 3), "reduction_axes": (0, 1, 3)},
        {1: (2,)},
    ),
    "group_size": ({"num_groups": None, "group_size": 2}, {1: (5,)}),
    "groups of one channel": ({"num_groups": 8}, {1: (5,), 2: (1,)}),
    "the channels of one group": ({"num_groups": 1}, {3: (3, 4)}),
}


@pytest.mark.parametrize("case", AXES)
def test_axes_and_groups(quick_backend, case, rng):
    keywords, cuts = AXES[case]
    x, _, _ = draw(rng)
    y = run_tiled(quick_backend, x, grid(SHAPE, cuts), **keywords)
    assert_close(y, oracle.group_norm(x, **keywords), tolerance=CONTRACT)


@pytest.mark.parametrize("reduction_axes", [None, (1, 3)], ids=["all", "columns kept"])
def test_statistics_serve_every_layout(quick_backend, reduction_axes, rng):
    """Taken channels last, of tiles, and applied channels first, and the other way round."""
    x, _, _ = draw(rng)
    last = {"num_groups": 2, "reduction_axes": reduction_axes}
    first = {"num_groups": 2, "feature_axis": 1, "reduction_axes": reduction_axes and (1, 2)}
    reference = oracle.group_norm(x, **last)
    there, here = (quick_backend.asarray(from_channels_last(x, axis)) for axis in (-1, 1))
    y = normalize(here, group_statistics(there, **last), **first)
    assert_close(quick_backend.to_numpy(y), np.moveaxis(reference, -1, 1), tolerance=CONTRACT)
    y = normalize(there, group_statistics(here, **first), **last)
    assert_close(quick_backend.to_numpy(y), reference, tolerance=CONTRACT)


@pytest.mark.parametrize("dtype", [*LOW, "float64", "complex64", "complex128", "uint8", "int32"])
@pytest.mark.usefixtures("needs_bfloat16")
def test_dtypes_of_the_input(quick_backend, dtype, rng):
    skip_unless(quick_backend, dtype)
    x = 30 + 10 * rng.normal(size=SHAPE)
    if dtype.startswith("complex"):
        x = x + 1j * rng.normal(size=SHAPE)
    x = x.astype(host_dtype(dtype))
    y = run_tiled(quick_backend, x, grid(SHAPE, {1: (4, 4, 5)}), num_groups=2)
    reference = oracle.group_norm(x, num_groups=2)
    result = quick_backend.default_float if "int" in dtype else dtype
    assert y.dtype == host_dtype(result)
    if dtype in LOW:
        assert_rounded(y, reference, dtype)
    else:
        wide = result in ("float64", "complex128")
        assert_close(y, reference, tolerance=CONTRACT_64 if wide else CONTRACT)


@pytest.mark.parametrize(
    ("given", "dtype", "result"),
    [
        ("float32", "float64", "float64"),
        ("float32", "float16", "float16"),
        ("float16", None, "float32"),  # with float32 parameters
        ("float16", "input", "float16"),
        ("float64", "float32", "float32"),
    ],
)
def test_the_dtype_option(quick_backend, given, dtype, result, rng):
    skip_unless(quick_backend, given, result)
    x, scale, bias = draw(rng, offset=0)
    x = x.astype(given)
    y = run_tiled(quick_backend, x, grid(SHAPE, {1: (4,)}), scale, bias, num_groups=2, dtype=dtype)
    reference = oracle.group_norm(x, scale, bias, num_groups=2)
    assert y.dtype == result
    if result == "float16":
        assert_rounded(y, reference, result)
    else:
        # Float64 results of float32 statistics have the digits of these.
        assert_close(y, reference, tolerance=CONTRACT)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-40, 0])
def test_huge_and_tiny_data(backend, epsilon, rng):
    """As test_accuracy's test of this name, with a constant tile and tiles of single positions."""
    shape = (2, 40, 8)
    tiles = grid(shape, {1: (1, 2, 20, 30)})
    call = backend.transform(functools.partial(over_tiles, num_groups=8, epsilon=epsilon))
    for size in (1e20, 1e-20, 1):
        x = (size * rng.normal(size=shape)).astype(np.float32)
        x[tiles[-1]] = 0
        y = run_tiled(backend, x, tiles, call=call)
        reference = oracle.group_norm(x, num_groups=8, epsilon=epsilon)
        largest = np.abs(reference).max()
        # Relative, since the whole output is of size 1e-17 where epsilon dwarfs the variance.
        assert_close(y / largest, reference / largest, tolerance=CONTRACT)


@pytest.mark.parametrize("axis", [-1, 1], ids=["last", "first"])
def test_constants_give_exactly_the_bias(backend, axis, rng):
    values = constants(rng)
    x = np.broadcast_to(values[:, None, None, None], (len(values), 7, 11, 6))
    scale, bias = rng.normal(size=(2, 6)).astype(np.float32)
    x = from_channels_last(x, axis)
    tiles = grid(x.shape, {1 + (axis == 1): (1, 4, 4), 2 + (axis == 1): (8,)})
    y = run_tiled(backend, x, tiles, scale, bias, num_groups=2, feature_axis=axis)
    wrong = (np.moveaxis(y, axis, -1) != bias).any(axis=(1, 2, 3))
    assert not wrong.any(), f"constants {values[wrong].tolist()}"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_stay_in_their_groups(backend, bad, rng):
    x, _, _ = draw(rng)
    reference = oracle.group_norm(x, num_groups=4)
    reference[1, :, :, 2:4] = np.nan
    x[1, 7, 3, 2] = bad
    with np.errstate(invalid="ignore"):
        y = run_tiled(backend, x, grid(SHAPE, {1: (4, 4)}), num_groups=4)
    assert_close(y, reference, tolerance=CONTRACT)


@pytest.mark.parametrize("offset", [0, 1e5])
def test_counts_beyond_what_float32_can_count(quick_backend, offset, rng):
    """Copies of the same data, 3 * 2**24 of them, have the mean and variance of one."""
    x, _, _ = draw(rng, (2, 7, 9), offset)
    given = quick_backend.asarray(x)
    one = group_statistics(given, num_groups=3)
    many = merge_statistics(one, one, one)
    for _ in range(24):
        many = merge_statistics(many, many)
    for part in (many, merge_statistics(many, one)):  # one more changes nothing one could see
        np.testing.assert_allclose(quick_backend.to_numpy(part.count), 3 * 2**24 * 21, rtol=1e-7)
        y = quick_backend.to_numpy(normalize(given, part, num_groups=3))
        assert_close(y, oracle.group_norm(x, num_groups=3), tolerance=CONTRACT)


@pytest.mark.parametrize("drift", [0, 1e-2, 10], ids=lambda n: f"drift {n:g}")
def test_a_thousand_merges_one_by_one(quick_backend, drift, rng):
    """A stream: its length does not add up rounding."""
    x = 1e5 + drift * np.arange(1000)[:, None] + rng.normal(size=(2, 1000, 6))
    x = x.astype(np.float32)
    given = quick_backend.asarray(x)
    parts = (group_statistics(given[:, i : i + 1], num_groups=2) for i in range(1000))
    whole = functools.reduce(merge_statistics, parts)
    y = quick_backend.to_numpy(normalize(given, whole, num_groups=2))
    assert_close(y, oracle.group_norm(x, num_groups=2), tolerance=CONTRACT)


# Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "shape"),
    [
        ({"num_groups": 2}, (2, 2)),
        ({"num_groups": None, "group_size": 1}, (2, 8)),
        ({"num_groups": 3, "feature_axis": 1}, (2, 3)),
        ({"num_groups": 2, "feature_axis": (1, 3)}, (2, 2)),
        ({"num_groups": 2, "feature_axis": 0}, (2,)),
        ({"num_groups": 2, "reduction_axes": (0, 1, 2, 3)}, (2,)),
        ({"num_groups": 2, "reduction_axes": -1}, (2, 9, 10, 2)),
        ({"num_groups": 3, "feature_axis": 1, "reduction_axes": (1, 2)}, (2, 8, 3)),
        ({"num_groups": 2, "feature_axis": 0, "reduction_axes": (0, 2)}, (9, 8, 2)),
    ],
    ids=str,
)
def test_shapes_of_the_fields(quick_backend, keywords, shape, rng):
    """The kept axes in x's order, then the groups."""
    x, _, _ = draw(rng)
    statistics = group_statistics(quick_backend.asarray(x), **keywords)
    assert isinstance(statistics, GroupStatistics)
    for field in (*statistics, statistics.variance, *merge_statistics(statistics, statistics)):
        check_array(quick_backend, field, shape=shape, dtype="float32")
    assert (quick_backend.to_numpy(statistics.count) == x.size / math.prod(shape)).all()


@pytest.mark.parametrize("offset", [0, 1e5])
def test_values_of_the_fields(backend, offset, rng):
    """Library, device and dtype, and the digits a single float32 does not have at 1e5."""
    x, _, _ = draw(rng, (2, 30, 8), offset)
    mask = rng.random((2, 30, 1)) < 0.7
    call = backend.transform(functools.partial(group_statistics, num_groups=2))
    statistics = call(backend.asarray(x), mask=backend.asarray(mask))
    for field in statistics:
        check_array(backend, field, shape=(2, 2), dtype="float32")
    assert (backend.to_numpy(statistics.unit) == 1).all()
    count, mean, variance = numbers(backend, statistics)
    nearest = backend.to_numpy(statistics.mean)
    for sample, group in itertools.product(range(2), range(2)):
        here = x[sample, mask[sample, :, 0], 4 * group : 4 * group + 4].astype(float).ravel()
        exact = math.fsum(here) / here.size
        at = sample, group
        assert count[at] == here.size
        assert abs(mean[at] - exact) <= 1e-6
        # The nearest float, to the accuracy the mean itself has relative to a spread of 1.
        assert abs(nearest[at] - exact) <= np.spacing(np.float32(max(1, abs(exact))))
        assert math.isclose(variance[at], math.fsum((here - exact) ** 2) / here.size, rel_tol=1e-6)
    np.testing.assert_allclose(backend.to_numpy(statistics.variance), variance, rtol=1e-6)


@pytest.mark.parametrize("size", [1e20, 1e-20])
def test_units_of_huge_and_tiny_data(quick_backend, size, rng):
    """Squares would leave float32: what the fields mean does not."""
    x = (size * rng.normal(size=(2, 30, 8))).astype(np.float32)
    tiles = [quick_backend.asarray(part) for part in (x[:, :20], x[:, 20:])]
    statistics = merge_statistics(*(group_statistics(tile, num_groups=1) for tile in tiles))
    _, mean, variance = numbers(quick_backend, statistics)
    wide = x.astype(np.float64).reshape(2, -1)
    np.testing.assert_allclose(mean[:, 0], wide.mean(axis=1), rtol=1e-6, atol=1e-6 * size)
    np.testing.assert_allclose(variance[:, 0], wide.var(axis=1), rtol=1e-6)


@pytest.mark.parametrize("empty", ["an empty tile", "a masked tile"])
def test_nothing_is_the_identity_of_merging(backend, empty, rng):
    x, _, _ = draw(rng, (2, 7, 8), 1e5)
    statistics = group_statistics(backend.asarray(x), num_groups=2)
    if empty == "an empty tile":
        nothing = group_statistics(backend.asarray(x[:, :0]), num_groups=2)
    else:
        filled = backend.asarray(np.full_like(x, np.nan))
        nothing = group_statistics(filled, num_groups=2, mask=backend.asarray(np.zeros(8, bool)))
    for field in (*nothing, nothing.variance):
        check_array(backend, field, shape=(2, 2), dtype="float32")
    assert (backend.to_numpy(nothing.count) == 0).all()
    assert (backend.to_numpy(nothing.variance) == 1).all()
    for merged in (
        merge_statistics(statistics, nothing),
        merge_statistics(nothing, nothing, statistics),
    ):
        # Exactly but for the last bit: the residual is weighed with count / count.
        for field, same in zip(merged, statistics, strict=True):
            expected = backend.to_numpy(same)
            np.testing.assert_allclose(backend.to_numpy(field), expected, rtol=3e-7)
    both = merge_statistics(nothing, nothing)
    for field, same in zip(both, nothing, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(field), backend.to_numpy(same))


@pytest.mark.parametrize("keywords", [{}, {"feature_axis": 1}, {"reduction_axes": (1, 3)}], ids=str)
def test_one_part_is_what_the_layer_computes(backend, keywords, rng):
    """To a few last places: a layer's pivots are its channels' means, here the group's."""
    x, scale, bias = draw(rng, (2, 8, 10, 8))

    def both(x, scale, bias):
        options = {"num_groups": 2, **keywords}
        y = normalize(x, group_statistics(x, **options), scale, bias, **options)
        return y, group_norm(x, scale, bias, use_fast_variance=False, **options)

    y, same = backend.transform(both)(*map(backend.asarray, (x, scale, bias)))
    assert_close(
        backend.to_numpy(y), backend.to_numpy(same).astype(np.float64), tolerance=CONTRACT / 2
    )


@pytest.mark.parametrize("merged", [False, True], ids=["as they are", "merged"])
def test_statistics_made_by_hand(backend, merged):
    """Of numbers, or of arrays of any dtype; two fields are enough beside the count."""
    x = backend.asarray(np.array([[10, 14, 6, 30]], np.float32))
    arrays = [np.array([[10.0, 20.0]], np.float32), np.array([[16, 16]], np.int32)]
    mean, m2 = map(backend.asarray, arrays)
    known = GroupStatistics(4, mean, m2)
    if merged:
        known = merge_statistics(known, known, GroupStatistics(count=0, mean=mean, m2=0.0))
    y = backend.to_numpy(normalize(x, known, num_groups=2, epsilon=0))
    np.testing.assert_array_equal(y, np.array([[0, 2, -7, 5]], np.float32))


def test_numbers_alone(backend):
    """A number serves all groups, with all its digits."""
    x = np.linspace(1e5, 1e5 + 1, 9, dtype=np.float32)[:, None]
    call = backend.transform(
        lambda x: normalize(x, GroupStatistics(9, 1e5 + 0.0123, 9 / 4), num_groups=1, epsilon=0)
    )
    y = backend.to_numpy(call(backend.asarray(x)))
    assert_close(y, (x.astype(np.float64) - (1e5 + 0.0123)) * 2, tolerance=CONTRACT)


def test_complex_statistics_by_hand(quick_backend, rng):
    """Counts are real all the same."""
    x = (rng.normal(size=(2, 9, 4)) + 1j * rng.normal(size=(2, 9, 4))).astype(np.complex64)
    given = quick_backend.asarray(x)
    measured = group_statistics(given, num_groups=1)
    for known in (measured._replace(count=36), merge_statistics(measured._replace(count=36))):
        y = quick_backend.to_numpy(normalize(given, known, num_groups=1))
        assert_close(y, oracle.group_norm(x, num_groups=1), tolerance=CONTRACT)
    y = quick_backend.to_numpy(normalize(given, GroupStatistics(4, 1 - 1j, 16), num_groups=1))
    assert_close(y, (x - (1 - 1j)) / math.sqrt(4 + 1e-6), tolerance=CONTRACT)


@pytest.mark.parametrize("mean", [5.0, np.nan])
def test_the_mean_of_nothing_is_0(quick_backend, mean, rng):
    """Whatever the mean and m2 of a count of 0 say, such as NumPy's NaN."""
    x, _, _ = draw(rng, (2, 7, 8))
    given = quick_backend.asarray(x)
    zeros, filled = np.zeros((2, 2), np.float32), np.full((2, 2), mean, np.float32)
    nothing = GroupStatistics(*map(quick_backend.asarray, (zeros, filled, filled)))
    y = quick_backend.to_numpy(normalize(given, nothing, num_groups=2))
    assert_close(y, x / math.sqrt(1 + 1e-6), tolerance=CONTRACT)
    whole = merge_statistics(nothing, group_statistics(given, num_groups=2), nothing)
    y = quick_backend.to_numpy(normalize(given, whole, num_groups=2))
    assert_close(y, oracle.group_norm(x, num_groups=2), tolerance=CONTRACT)


@pytest.mark.parametrize("given", ["of the library", "of NumPy"])
@pytest.mark.parametrize("offset", [0, 1e5])
def test_float64_statistics_of_float32_data(backend, offset, given, rng):
    """The mean's digits are kept, also where the library has no float64."""
    x, _, _ = draw(rng, (2, 50, 8), offset)
    with backend.precision("float64" if given == "of the library" else None):
        source = Backend.NUMPY if given == "of NumPy" else backend
        statistics = group_statistics(source.asarray(x.astype(np.float64)), num_groups=2)
        # All digits in one number.
        one = statistics._replace(mean=statistics.mean + statistics.residual, residual=0.0)
        call = backend.transform(lambda x: normalize(x, one, num_groups=2))
        y = call(backend.asarray(x))
        check_array(backend, y, shape=x.shape, dtype="float32")
        y = backend.to_numpy(y)
    assert_close(y, oracle.group_norm(x, num_groups=2), tolerance=CONTRACT)


def test_numpy_statistics_serve_every_library(backend, rng):
    x, _, _ = draw(rng, (2, 50, 8), 1e5)
    statistics = group_statistics(x, num_groups=2)
    y = backend.transform(lambda x: normalize(x, statistics, num_groups=2))(backend.asarray(x))
    check_array(backend, y, shape=x.shape, dtype="float32")
    assert_close(backend.to_numpy(y), oracle.group_norm(x, num_groups=2), tolerance=CONTRACT)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("float32", "float64"), "float64"),
        (("float32", "complex64"), "complex64"),
        (("float16", "float16"), "float32"),
    ],
)
def test_dtypes_of_what_is_merged(quick_backend, dtypes, expected):
    """At least float32, where counts of single data, not of float16's 65504 at most, are kept."""
    skip_unless(quick_backend, *dtypes)
    parts = [
        GroupStatistics(40000, quick_backend.asarray(np.array([[value]], dtype)), 0)
        for value, dtype in zip((10, 20), dtypes, strict=True)
    ]
    merged = merge_statistics(*parts)
    for field, name in zip(merged, ("count", "mean", "m2", "residual", "unit"), strict=True):
        real = name not in ("mean", "residual")
        dtype = "float32" if real and expected == "complex64" else expected
        check_array(quick_backend, field, shape=(1, 1), dtype=dtype)
    count, mean, variance = numbers(quick_backend, merged)
    assert (count.item(), mean.item()) == (80000, 15)
    assert math.isclose(variance.item(), 25, rel_tol=2.0**-22)
