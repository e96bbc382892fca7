"""Each stage of the compiled core alone, as distributed normalization calls them."""

from __future__ import annotations

import numpy as np
import pytest

from groupnorm.backends.kernels.variants import DTYPES
from tests.kernels.core import INPUT_GRADIENT, MEASURE, NORMALIZE, SUM, Call, check, needs_core
from tests.portable.test_activation import slope

needs_core()
each_layout = pytest.mark.parametrize("first", [True, False], ids=["first", "last"])

SIZES = [(3, 2, 3, 40), (5, 3, 20, 1), (2, 2, 5, 1), (20, 2, 2, 600), (1, 2, 2, 70000)]
OPTIONS = [
    {}, {"masked": "one", "rows": True}, {"masked": "each", "offset": 1e4},
    {"x": "float16", "activation": "silu"}, {"x": "bfloat16", "masked": "each", "rows": True},
    {"activation": "gelu", "parameters": False}, {"activation": "relu", "masked": "one"},
]  # fmt: skip


def measured(call, threads=1):
    """Return mean, M2 and count of each group."""
    statistics = np.full((3, *call.sizes[:2]), np.nan)
    call.stage(MEASURE, statistics, threads=threads)
    return statistics


def finished(measured, epsilon):
    """Return mean, 1 / standard deviation and 1 / count."""
    mean, m2, count = measured
    variance = np.where(count > 0, m2 / np.maximum(count, 1), 1)
    return np.stack([mean, 1 / np.sqrt(variance + epsilon), (count > 0) / np.maximum(count, 1)])


def merged(a, b):
    """Return the statistics of two sets of elements, by the formula of Chan, Golub and LeVeque."""
    count, delta = a[2] + b[2], b[0] - a[0]
    weight = b[2] / count
    return np.stack([a[0] + delta * weight, a[1] + b[1] + delta**2 * a[2] * weight, count])


@pytest.fixture(params=SIZES, ids=str)
def sizes(request):
    return request.param


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@each_layout
def test_each_stage(first, sizes, options):
    """In float64, and equal to the whole call."""
    call = Call(sizes, first=first, **options)
    call.avoid_kink()
    samples, groups, size, _ = sizes
    y, (dx, dscale, dbias) = call.forward(3), call.backward(3)

    statistics = measured(call, threads=3)
    x = call.x.astype(np.float64).reshape(samples, groups, -1)
    valid = np.ones((1, 1)) if call.mask is None else call.mask.astype(np.float64)
    weight = np.broadcast_to(valid[:, None, None], (samples, groups, size, call.x.shape[2]))
    weight = weight.reshape(samples, groups, -1)
    count = weight.sum(2)
    mean = (x * weight).sum(2) / count
    m2 = ((x - mean[:, :, None]) ** 2 * weight).sum(2)
    np.testing.assert_array_equal(statistics[2], count)
    np.testing.assert_allclose(statistics[0], mean, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(statistics[1], m2, rtol=2e-6)

    final = finished(statistics, call.epsilon)
    np.testing.assert_array_equal(final, call.statistics)
    alone = call.empty(call.dtypes[1])
    call.stage(NORMALIZE, final, alone, threads=3)
    np.testing.assert_array_equal(alone, call.flat(y))

    channels = groups * size
    g = call.dy.astype(np.float64) * slope(call.z(), call.activation)
    sums = np.full((2, samples, channels), np.nan)
    call.stage(SUM, call.statistics, None, call.flat(call.dy), sums, threads=3)
    for got, want in zip(sums, (g.sum(2), (g * call.xhat()).sum(2)), strict=True):
        assert (np.abs(got - want) <= 5e-6 * np.maximum(np.abs(want).max(), 1)).all()
    for got, want in zip((dbias, dscale), sums, strict=True):
        whole = want if call.rows else want.sum(0, keepdims=True)
        np.testing.assert_allclose(got, whole, rtol=1e-6, atol=1e-6 * np.abs(whole).max())

    scale = np.ones((1, channels)) if call.scale is None else call.scale
    means = (sums * scale).reshape(2, samples, groups, size).sum(3) * call.statistics[2]
    alone = call.empty(call.dtypes[0])
    call.stage(INPUT_GRADIENT, call.statistics, alone, call.flat(call.dy), means, threads=3)
    alone = call.shaped(alone, call.dtypes[0])
    check(alone, dx.astype(np.float64), call.dtypes[0], np.abs(dx.astype(np.float64)).max())


@pytest.mark.parametrize("masked", [None, "each"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e3])
@each_layout
def test_halves_merge_to_the_whole(first, offset, dtype, masked):
    """Positions are divided among processes, which exchange statistics and sums."""
    call = Call((2, 2, 3, 5001), first=first, x=dtype, offset=offset, masked=masked)
    parts = []
    for part in (slice(0, 1234), slice(1234, None)):
        positions = call.x[..., part].shape[2]
        half = Call((2, 2, 3, positions), first=first, x=dtype, masked=masked)
        half.x, half.dy = call.x[..., part], call.dy[..., part]
        half.scale, half.bias = call.scale, call.bias
        half.mask = None if masked is None else call.mask[:, part]
        parts.append(half)
    together = merged(*map(measured, parts))
    whole = measured(call)
    np.testing.assert_array_equal(together[2], whole[2])
    np.testing.assert_allclose(together[0], whole[0], rtol=1e-9, atol=1e-7)
    np.testing.assert_allclose(together[1], whole[1], rtol=1e-6)

    statistics = finished(together, call.epsilon)
    sums, results = np.zeros((2, 2, 6)), []
    for half in parts:
        y, own = half.empty(dtype), np.full((2, 2, 6), np.nan)
        half.stage(NORMALIZE, statistics, y)
        half.stage(SUM, statistics, None, half.flat(half.dy), own)
        results.append(half.shaped(y, dtype))
        sums += own
    check(np.concatenate(results, 2), call.want_y(), dtype)
    want = call.want_gradients()
    check(np.stack([sums[1].sum(0), sums[0].sum(0)])[:, None], np.stack(want[1:]), "float32",
          np.abs(np.stack(want[1:])).max())  # fmt: skip
    means = (sums * call.scale).reshape(2, 2, 2, 3).sum(3) * statistics[2]
    results = []
    for half in parts:
        dx = half.empty(dtype)
        half.stage(INPUT_GRADIENT, statistics, dx, half.flat(half.dy), means)
        results.append(half.shaped(dx, dtype))
    check(np.concatenate(results, 2), want[0], dtype, np.abs(want[0]).max())


@each_layout
def test_given_statistics_need_not_be_those_of_x(first):
    """As those of a whole array, of which x is a part."""
    call = Call((2, 3, 2, 700), first=first, activation="silu")
    statistics = np.random.default_rng(0).uniform(0.5, 2, (3, 2, 3))
    y = call.empty("float32")
    call.stage(NORMALIZE, statistics, y)
    mean, rstd, _ = np.repeat(statistics, 2, axis=2)[..., None]
    scale, bias = call.parameters()
    z = (call.x - mean) * rstd * scale + bias
    check(call.shaped(y, "float32"), z / (1 + np.exp(-z)), "float32")


@each_layout
@pytest.mark.parametrize("positions", [1, 6])
def test_samples_without_a_valid_element_have_no_count(positions, first):
    call = Call((3, 2, 2, positions), first=first, masked="each")
    call.mask[1] = False
    call.mask[[0, 2]] = True
    statistics = measured(call)
    np.testing.assert_array_equal(statistics[:, 1], 0)
    assert (statistics[2, [0, 2]] == 2 * positions).all()
