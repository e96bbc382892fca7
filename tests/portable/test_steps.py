"""The steps of the portable implementation, each by itself, on NumPy: `nox -s mutants` runs these.

References are computed here, in float64, from lists of elements.
"""

from __future__ import annotations

import math

import array_api_compat.numpy as xp
import numpy as np
import pytest

from groupnorm.backends.numpy.adapter import NumpyAdapter, numpy_adapter
from groupnorm.distributed.replicas import Replicas
from groupnorm.plan import make_plan_uncached
from groupnorm.portable import statistics as steps
from groupnorm.portable.backward import pull_back
from groupnorm.portable.merge import GroupStatistics, at_least_one, merge, merge_replicas
from groupnorm.portable.pivots import at_least_rounding, clip, clip_real, pivots, unit_of
from groupnorm.testing import oracle

F = np.float32
EPSILON = 1e-6


class Compiled(NumpyAdapter):
    """NumPy as a library whose values cannot be read, and whose arrays are not overwritten."""

    reads_values = False
    overwrites = False
    has_autograd = True


ADAPTERS = {"eager": numpy_adapter, "compiled": Compiled(xp)}


@pytest.fixture(params=ADAPTERS)
def adapter(request):
    return ADAPTERS[request.param]


@pytest.fixture(autouse=True)
def _underflow():
    with np.errstate(under="ignore"):
        yield


def plan_of(shape, groups=2, *, sampled=False, feature=(-1,), static=True):
    return make_plan_uncached(
        shape, feature, groups, None, None, sampled=sampled, static=static, blocked=static
    )


def column(*values, dtype=F):
    return np.array(values, dtype).reshape(-1, 1)


# Pivots -------------------------------------------------------------------------------------------

TINY = 2.0**-124  # four times the smallest normal float32


@pytest.mark.parametrize(
    ("spread", "epsilon", "unit"),
    [
        (4.0, 1e-6, 0.25), (1e-3, 1e-6, 1e3), (1e-4, 1e-6, 1e3), (0.0, 1e-6, 1e3), (0.0, 0.0, 1.0),
        (np.nan, 1e-6, 1e3), (np.inf, 1e-6, 0.0), (1e-20, 0.0, 1e20),
        # Subnormal spreads, whose reciprocals overflow.
        (1e-40, 0.0, 0.5 / TINY), (TINY, 0.0, 0.5 / TINY), (TINY * 1.5, 0.0, 1 / (TINY * 1.5)),
        (TINY / 2, TINY**2, 1 / TINY), (1e-40, TINY**2 / 4, 0.5 / TINY),
        # Roots of epsilon of a quarter of it and less.
        (0.0, TINY**2 / 4, 1 / TINY), (0.0, TINY**2 / 16, 1 / TINY), (0.0, TINY**2 / 17, 1.0),
    ],
)  # fmt: skip
def test_units(spread, epsilon, unit):
    got = unit_of(np.array([spread], F), epsilon, numpy_adapter)
    assert got.dtype == F
    np.testing.assert_allclose(got, [unit], rtol=1e-6)


def test_units_of_wider_dtypes():
    for dtype in (np.float64, np.longdouble):
        got = unit_of(np.array([0, 1e-310, 1e-300], dtype), 0.0, numpy_adapter)
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(float), [1, 2.0**1019, 1e300], rtol=1e-12)


@pytest.mark.parametrize(
    ("spread", "size", "want"),
    [
        (0.0, 1e18, 2.0**-23 * 1e18), (1e12, 1e18, 1e12),
        (0.0, 1e25, math.sqrt(1e-6 * 2.0**126) / 8),
        (1e20, 1e25, 1e20), (0.0, 0.0, 0.0),
    ],
)  # fmt: skip
def test_constant_samples_are_rounded(spread, size, want):
    got = at_least_rounding(np.array([spread], F), np.array([size], F), 1e-6, numpy_adapter)
    np.testing.assert_allclose(got, [want], rtol=1e-6)


def test_clipping():
    x = np.array([1, 2, 3, 4, np.nan])
    np.testing.assert_array_equal(clip_real(x, 2, 3, xp), [2, 2, 3, 3, np.nan])
    x = np.array([1 + 9j, 3 + 3j])
    low, high = np.array([2 + 2j, 2 + 2j]), np.array([5 + 5j, 5 + 5j])
    np.testing.assert_array_equal(clip(x, low, high, numpy_adapter), [2 + 5j, 3 + 3j])


# A sample, 16 positions, two groups of two channels: channel means 7.5, 3, 0.1 and 8.
def ladder(dtype=F):
    x = np.zeros((1, 16, 4), dtype)
    x[0, :, 0], x[0, :, 1], x[0, :, 2] = np.arange(16), 3, 0.1
    x[0, :, 3] = np.arange(0.5, 16.5)
    return x


def test_pivots_are_means():
    plan = plan_of((1, 16, 4))
    pivot, lowest, highest = pivots(ladder(), None, 16, plan, numpy_adapter)
    np.testing.assert_array_equal(pivot.ravel(), np.array([7.5, 3, 0.1, 8], F))
    np.testing.assert_array_equal(lowest.ravel(), np.array([0, 0.1], F))
    np.testing.assert_array_equal(highest.ravel(), np.array([15, 15.5], F))
    assert pivot.shape == (1, 1, 2, 2)
    assert lowest.shape == highest.shape == (1, 1, 2, 1)
    complex_pivot, *_ = pivots(1j * ladder(np.complex64), None, 16, plan, numpy_adapter)
    np.testing.assert_array_equal(complex_pivot, 1j * pivot)


def test_pivots_with_a_mask():
    """Channels without a valid element take their group's minimum; groups without one take 0."""
    x, plan = ladder(), plan_of((1, 16, 4))
    mask = np.zeros((1, 16, 4), bool)
    mask[0, 4:9, 0] = True
    pivot, lowest, highest = pivots(x, mask, np.array([5, 1, 1, 1]), plan, numpy_adapter)
    np.testing.assert_array_equal(pivot.ravel(), [6, 4, 0, 0])
    np.testing.assert_array_equal(lowest.ravel(), [4, 0])
    np.testing.assert_array_equal(highest.ravel(), [8, 1])
    # Constant channels and groups are not empty.
    mask[0, 3:5, 2] = mask[0, 7, 1] = True
    pivot, lowest, highest = pivots(x, mask, np.array([5, 1, 2, 1]), plan, numpy_adapter)
    np.testing.assert_array_equal(pivot.ravel(), np.array([6, 3, 0.1, 0.1], F))
    np.testing.assert_array_equal(lowest.ravel(), np.array([3, 0.1], F))
    np.testing.assert_array_equal(highest.ravel(), np.array([8, 0.1], F))
    mask[0, 7, 3] = True
    pivot, _, _ = pivots(x, mask, np.array([5, 1, 2, 1]), plan, numpy_adapter)
    np.testing.assert_array_equal(pivot.ravel(), np.array([6, 3, 0.1, 7.5], F))


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 16, 4)])
def test_pivots_of_nothing(shape):
    plan = plan_of(shape)
    pivot, lowest, highest = pivots(np.zeros(plan.work_shape, F), None, 1, plan, numpy_adapter)
    assert pivot.shape == ((2, 1, 2, 1) if shape[0] else (0, 1, 2, 2))
    assert not pivot.any()
    assert lowest.shape == highest.shape
    assert lowest.ndim == pivot.ndim
    assert not lowest.any()


# Merging ------------------------------------------------------------------------------------------


def statistics_of(parts, units, centre=0.0):
    """Statistics of lists of values; each mean is rounded to a multiple of 2**-6."""
    rows = []
    for part, unit in zip(parts, units, strict=True):
        values = np.asarray(part) - centre
        mean = values.mean() if len(part) else 1e30
        rounded = np.round((mean + centre) * 64) / 64 if len(part) else 1e30
        spread = (abs(values - mean) ** 2).sum() * unit**2 if len(part) else 0
        residual = (mean + centre - rounded) * unit if len(part) else 0
        rows.append((len(part), rounded, spread, residual, unit))
    return GroupStatistics(*(np.array(column)[:, None] for column in zip(*rows, strict=True)))


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.parametrize("units", [(1, 1, 1), (0.5, 4, 3.0), (2, 0, 8), (2, math.nan, 8)])
def test_merging(units, kind):
    rng = np.random.default_rng(0)
    parts = [rng.normal(i, size=n) for i, n in enumerate((5, 0, 3))]
    if kind is complex:
        parts = [part + 1j * rng.normal(3, size=part.size) for part in parts]
    got = merge(statistics_of(parts, units), numpy_adapter, EPSILON)
    every = np.concatenate(parts)
    assert got.count == [8]
    np.testing.assert_allclose(got.mean + got.residual / got.unit, [every.mean()], rtol=1e-14)
    np.testing.assert_allclose(got.m2 / got.unit**2, [8 * every.var()], rtol=1e-13)
    reach = max(abs(every.real - got.mean.real).max(), abs(every.imag - got.mean.imag).max())
    assert 0.1 < got.unit[0] * reach < 2


def test_equal_means_stay_exact():
    got = merge(statistics_of([[0.1] * 7, [], [0.1] * 3], (1, 1, 1)), numpy_adapter, EPSILON)
    assert got.count == [10]
    assert got.mean + got.residual / got.unit == 0.1
    value = np.array([[F(0.1)]] * 3)
    same = GroupStatistics(
        column(7, 1, 3), value, column(0, 0, 0), column(0, 0, 0), column(1, 1, 1)
    )
    assert merge(same, numpy_adapter, EPSILON).mean == F(0.1)


def test_the_mean_of_nothing_is_0():
    nothing = GroupStatistics(
        column(0, 0), column(5, np.nan), column(0, 0), column(0, 0), column(1, 1)
    )
    got = merge(nothing._replace(mean=column(5, -7)), numpy_adapter, EPSILON)
    assert (got.count, got.mean, got.m2, got.residual) == (0, 0, 0, 0)
    assert np.isfinite(got.unit)
    assert got.variance == 1


def test_units_of_constant_parts_mean_nothing():
    """The common unit follows the distances of means and residuals alone, and spreads."""
    ones = column(1, 1, dtype=float)
    apart = GroupStatistics(ones, column(0, 1e-20, dtype=float), 0 * ones, 0 * ones, 7 * ones)
    got = merge(apart, numpy_adapter, 0.0)
    np.testing.assert_allclose(got.unit, [2e20], rtol=1e-12)
    np.testing.assert_allclose(got.m2, [2.0], rtol=1e-12)
    residual = apart._replace(mean=5 * ones, residual=column(-7e-20, 7e-20, dtype=float))
    got = merge(residual, numpy_adapter, 0.0)
    np.testing.assert_allclose(got.unit, [1e20], rtol=1e-12)
    np.testing.assert_allclose(got.m2, [2.0], rtol=1e-12)
    spread = apart._replace(mean=5 * ones, m2=ones, unit=1e-9 * ones)
    np.testing.assert_allclose(merge(spread, numpy_adapter, 0.0).unit, [1e-9], rtol=1e-12)
    # Parts without an element are at any distance.
    empty = apart._replace(count=column(2, 0, dtype=float), mean=column(5, 1e9, dtype=float))
    assert merge(empty, numpy_adapter, EPSILON).unit == 1e3


def test_counts_that_divide():
    np.testing.assert_array_equal(at_least_one(np.array([0.0, 1, 2, 0.5]), xp), [1, 1, 2, 0.5])


def test_variances():
    count, m2 = np.array([0.0, 2, 4]), np.array([0.0, 6, 8])
    plain = GroupStatistics(count, m2, m2)
    np.testing.assert_array_equal(plain.variance, [1, 3, 2])
    assert plain.residual == 0
    np.testing.assert_array_equal(plain._replace(unit=2.0).variance, [1, 0.75, 0.5])
    np.testing.assert_array_equal(plain._replace(count=1.0).variance, m2)


@pytest.mark.parametrize("kind", [float, complex])
def test_merging_replicas(kind):
    """Two replicas with equal statistics: the elements of each count."""
    part = np.array([1.0, 2, 6]) + (1j * np.array([2.0, 4, 3]) if kind is complex else 0)
    one = GroupStatistics(*(a[0] for a in statistics_of([part], [2.0])))
    both = Replicas(0, 2, lambda rows: rows + rows[::-1])
    got = merge_replicas(one._replace(count=3.0), numpy_adapter, EPSILON, both, None)
    assert got.count == [6]
    np.testing.assert_allclose(got.mean + got.residual / got.unit, [part.mean()], rtol=1e-14)
    np.testing.assert_allclose(got.m2 / got.unit**2, [6 * part.var()], rtol=1e-14)


# Statistics ---------------------------------------------------------------------------------------


def groups_of(x, mask=None, groups=2):
    """Return the valid elements of each group of (samples, positions, channels), in float64."""
    wide = x.astype(np.complex128 if np.iscomplexobj(x) else float)
    n, _, c = x.shape
    wide = wide.reshape(n, -1, groups, c // groups)
    valid = np.ones(wide.shape, bool)
    if mask is not None:
        valid = np.broadcast_to(mask, x.shape).reshape(wide.shape)
    return [wide[i, :, g][valid[i, :, g]] for i in range(n) for g in range(groups)]


def check_measure(x, adapter, mask=None, *, epsilon=EPSILON, sampled=False, rtol=2e-6, groups=2):
    """Measure, and compare with float64; return the statistics and the deviations."""
    plan = plan_of(x.shape, groups, sampled=sampled)
    work = x.reshape(plan.work_shape)
    given = mask
    if mask is not None:
        mask = mask.reshape(plan.mask_shapes(mask.shape)[2])
    before = work.copy()
    got, deviations = steps.measure(work, mask, plan, adapter, epsilon)
    np.testing.assert_array_equal(work, before)
    wanted = groups_of(x, given, groups)
    flat = [np.broadcast_to(a, plan.grouped_statistics_shape).ravel() for a in got]
    for i, values in enumerate(wanted):
        count, mean, m2, residual, unit = (
            a[i].astype(complex) if a[i].dtype.kind == "c" else float(a[i]) for a in flat
        )
        assert count == len(values)
        if not len(values):
            assert m2 == 0
            continue
        sigma = values.std()
        assert abs(mean + residual / unit - values.mean()) <= rtol * sigma
        assert abs(m2 / unit**2 - len(values) * values.var()) <= rtol * len(values) * values.var()
    pivot = deviations.pivot.reshape(plan.ungrouped(deviations.pivot.shape))
    unit = deviations.unit.reshape(plan.ungrouped(deviations.unit.shape))
    expected = (work - pivot) * (1 if mask is not None else unit)
    np.testing.assert_array_equal(deviations.values, expected)
    return got, deviations


# Few positions (one stage), many (two), and one channel in a group.
SHAPES = [((2, 5, 4), 2), ((2, 40, 4), 2), ((2, 600, 4), 4)]


@pytest.mark.parametrize("dtype", [F, np.complex64])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20, 1e4])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_measuring(shape, groups, size, dtype, adapter):
    rng = np.random.default_rng(0)
    x = rng.normal(10, size=shape) + np.arange(shape[-1])
    if dtype is np.complex64:
        x = x + 1j * rng.normal(-7, size=shape)
    x = (x * size).astype(dtype)
    _, deviations = check_measure(x, adapter, epsilon=EPSILON * size**2, groups=groups)
    assert deviations.scaled == (adapter is not numpy_adapter or size in (1e-20, 1e20))
    check_measure(x, adapter, epsilon=EPSILON * size**2, groups=groups, sampled=True)


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
@pytest.mark.parametrize("axes", [(2, 1), (1, 4), (2, 4), (1, 1)])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_measuring_with_a_mask(shape, groups, axes, size, adapter):
    """A mask may vary along the channels, and a channel may have no valid element."""
    rng = np.random.default_rng(0)
    x = (size * (rng.normal(10, size=shape) + np.arange(shape[-1]))).astype(F)
    samples, channels = axes
    mask = rng.random((samples, shape[1], channels)) < 0.6
    mask[:, :2, :] = True
    if channels == 4 and groups == 2:
        mask[..., 1] = False
        x[..., 1] = 3e38
    if samples == 2:
        mask[1] = False
    with np.errstate(over="ignore"):
        check_measure(x, adapter, mask, epsilon=EPSILON * size**2, groups=groups)
    whole = np.ones((samples, 1, channels), bool)
    if channels == 1:
        got, _ = check_measure(x, adapter, whole, epsilon=EPSILON * size**2, groups=groups)
        assert (got.count == shape[1] * 4 // groups).all()


@pytest.mark.parametrize(("step", "scaled"), [(2.0**20, False), (2.0**20 + 1, True)])
def test_ordinary_spreads_need_no_scale(step, scaled):
    x, mask = np.zeros((1, 40, 4), F), np.ones((1, 1, 1), bool)
    x[:, ::2] = step
    got, deviations = check_measure(x, numpy_adapter, mask)
    assert deviations.scaled == scaled
    assert (got.unit == (1 / F(step) if scaled else 1)).all()
    x[:, ::2] = 2.0**-20 if not scaled else 2.0**-20 * 0.99
    _, deviations = check_measure(x, numpy_adapter, mask, epsilon=1e-20)
    assert deviations.scaled == scaled


@pytest.mark.parametrize("positions", [6, 40, 600])
@pytest.mark.parametrize("mean", [0.0, -0.5, 0.5, 0.502, 30.0])
def test_a_mean_near_0_is_not_subtracted(mean, positions):
    """Means are near up to half a standard deviation; here only that of the last group matters."""
    x = np.ones((2, positions, 4), F)
    x[:, ::2] = -1
    x[-1, :, 2:] += F(mean)
    _, deviations = check_measure(x, numpy_adapter)
    near = abs(mean) <= 0.5
    assert np.shares_memory(deviations.values, x) == near
    assert bool(deviations.pivot.any()) != near
    assert not deviations.scaled


@pytest.mark.parametrize("size", [2.0**20, 2.0**-20, 2.0**20.5, 2.0**-20.5, math.inf, math.nan])
def test_squares_out_of_range_are_scaled(size):
    """Where the mean square might overflow or vanish, deviations have a scale."""
    x = np.ones((1, 40, 4), F)
    x[:, ::2] = -1
    x[..., 2:] *= F(size)
    with np.errstate(invalid="ignore", over="ignore"):
        plan = plan_of(x.shape)
        _, deviations = steps.measure(x, None, plan, numpy_adapter, 1e-20)
    direct = size in (2.0**20, 2.0**-20)
    assert (deviations.values is x) == direct


@pytest.mark.parametrize("offset", [0.0, 50.0], ids=["near", "far"])
def test_a_sample_that_misleads_is_noticed(offset):
    """Half a deviation from all means, the sample's mean is no pivot, however near it seems."""
    rng = np.random.default_rng(0)
    x = rng.normal(offset, size=(1, 129 * 16, 2)).astype(F)
    plan = plan_of(x.shape, 1, sampled=True)
    x[:, :: plan.sample[1].step] += 1.0
    x -= 1.0
    got, deviations = check_measure(x, numpy_adapter, sampled=True, groups=1)
    assert deviations.values is not x
    assert got.mean.item() != 0


@pytest.mark.parametrize("row", [2, 300], ids=["short rows", "long rows"])
@pytest.mark.parametrize("length", [9, 16, 255, 509])
@pytest.mark.parametrize("count", [1, 2], ids=["sum", "sum of products"])
def test_sums_of_equal_terms(count, length, row):
    """All roundings of a running sum may have the same sign: sum fewer terms at a time."""
    x = np.full((2, length, row), 0.1, F)
    exact = length * float(F(0.1)) ** count
    got = numpy_adapter.sum_of_product((x,) * count, 1)
    assert got.shape == (2, 1, row)
    np.testing.assert_allclose(got, exact, rtol=1e-6)
    x[:, -1] = 7.0
    got = numpy_adapter.sum_of_product((x,) * count, 1)
    exact += 7.0**count - float(F(0.1)) ** count
    np.testing.assert_allclose(got, exact, rtol=1e-6)


def test_a_constant_sample_of_huge_data():
    """The other values differ by a rounding, and their squares must not overflow."""
    x = np.full((1, 129 * 3, 2), 1e28, F)
    plan = plan_of(x.shape, 1, sampled=True)
    stride = plan.sample[1].step
    x[:, 1::stride] = np.nextafter(F(1e28), F(2e28))
    got, _ = check_measure(x, numpy_adapter, sampled=True, groups=1, rtol=1e-5)
    assert np.isfinite(got.m2).all()


def test_the_mean_of_equal_values_is_exact(adapter):
    """The reference of a group is clipped to its values."""
    x = np.full((1, 23, 6), 0.1, F)
    got, deviations = check_measure(x, adapter)
    assert (got.mean == F(0.1)).all()
    assert not got.residual.any()
    assert not deviations.values.any()


def test_huge_means_do_not_overflow(adapter):
    x = np.full((1, 20, 8), 2e38, F)
    x[:, ::2] = 1.9e38
    got, _ = steps.measure(x, None, plan_of(x.shape, 1), adapter, EPSILON)
    assert abs(float(got.mean.item()) / 1.95e38 - 1) < 1e-3


def centred_at(pivot, unit, x, mask=None):
    """Return a plan, and deviations of one-stage data (1, positions, 1 group, channels)."""
    plan = plan_of(x.shape, 1)
    shape = (1, 1, 1, x.shape[-1])
    pivot, unit = (np.broadcast_to(np.asarray(a, F), shape).copy() for a in (pivot, unit))
    return plan, steps.centre_at(x.reshape(plan.work_shape), mask, pivot, unit, plan, numpy_adapter)


def test_centring():
    x = np.array([[[1, 2], [3, 4]]], F)
    plan, got = centred_at([1, 2], 4, x)
    np.testing.assert_array_equal(got.values.ravel(), [0, 0, 8, 8])
    plan, got = centred_at([1, 2], 4, x, mask=np.ones((1, 2, 1, 1), bool))
    np.testing.assert_array_equal(got.values.ravel(), [0, 0, 2, 2])
    ones = np.ones((1, 1, 1, 1), F)
    statistics = GroupStatistics(2 * ones, 2 * ones, ones, ones, 3 * ones)
    got = steps.centre(x.reshape(plan.work_shape), None, statistics, plan, numpy_adapter)
    np.testing.assert_array_equal(got.values.ravel(), [-3, 0, 3, 6])
    assert got.pivot.shape == got.unit.shape == (1, 1, 1, 2)


def test_groups_without_local_elements_are_centred_at_the_mean_of_all():
    x = np.arange(8, dtype=F).reshape(1, 2, 2, 2)
    plan = plan_of((1, 2, 4))
    per_group = np.array([0, 1], F).reshape(1, 1, 2, 1)
    local = GroupStatistics(per_group, per_group, per_group, per_group, per_group)
    merged = local._replace(mean=np.array([10, 20], F).reshape(1, 1, 2, 1))
    pivot = np.array([1, 1, 2, 2], F).reshape(1, 1, 2, 2)
    before = steps.Deviations(x - pivot, pivot, 2 * np.ones_like(pivot), False)
    got = steps.recentre(x, before, local, merged, plan, numpy_adapter)
    np.testing.assert_array_equal(got.pivot.ravel(), [10, 10, 2, 2])
    np.testing.assert_array_equal(got.values, x - got.pivot)
    assert not got.scaled
    assert (got.unit == 2).all()


LARGEST = float(np.finfo(F).max)


@pytest.mark.parametrize("dtype", [F, np.complex64])
@pytest.mark.parametrize(
    ("unit", "rstd", "gain", "limit"),
    [
        (1, 1, 1, 2.0**-16), (1e10, 1, 1, 2.0**-16 / 1e10), (1, 1e6, 1, 2.0**-16 / 1e6),
        (1, 1e6, -100, 2.0**-16 / 1e8), (1, 1, 0.01, 2.0**-16), (1e10, 1e6, 1e2, 2.0**-16 / 1e10),
        (1e-9, 1e-9, 1, 2.0**-2), (1e-9, 1e-9, 1e5, 2.0**-2 / 1e5),
        (2.0**-13, 2.0**-13, 1, 2.0**-3), (1, 1e6, 0.01, 2.0**-16 / 1e6),
        (1, 1e36, 1, 2.0**-16 / 1e36),
        (1, 1e6, 1.5, 2.0**-16 / 1.5e6),
    ],
)  # fmt: skip
def test_masked_out_elements_saturate(unit, rstd, gain, limit, dtype):
    """Their products with the unit, with 1 / std and with the scale stay finite; others stay."""
    limit *= LARGEST
    x = np.array([1, 0.99 * limit, -0.99 * limit, 3.3e38, -3.3e38, 3.3e38, -0.5, 0.7])
    mask = np.array([1, 0, 0, 0, 0, 1, 0, 0], bool).reshape(1, 8, 1, 1)
    want = np.where(mask.ravel(), x, np.clip(x, -limit, limit))
    if dtype is np.complex64:
        x, want = x - 1j * x, want - 1j * want
    plan, centred = centred_at(0, unit, x.astype(dtype).reshape(1, 8, 1), mask)
    a = np.ones((1, 1, 1, 1), F)
    coefficients = steps.Coefficients(a, a, F(rstd) * a, a)
    with np.errstate(over="ignore", invalid="ignore"):
        got = steps.saturate(centred, mask, coefficients, F(gain) * a, plan, numpy_adapter)
        bare = steps.saturate(
            centred._replace(scaled=False), mask, coefficients, F(gain) * a, plan, numpy_adapter
        )
        wide = want.astype(dtype) * F(unit)
    np.testing.assert_allclose(bare.values.ravel(), want.astype(dtype), rtol=1e-6)
    np.testing.assert_allclose(got.values.ravel()[:5], wide[:5], rtol=1e-6)


def finished(m2, unit=1.0, count=4.0, mean=3.0, residual=0.0, epsilon=EPSILON, empty=False,
             pivot=2.0, own_unit=None):  # fmt: skip
    """Return the coefficients of one group, as floats."""
    a = np.ones((1, 1, 1, 1), F)
    s = GroupStatistics(count * a if empty else count, mean * a, F(m2) * a, residual * a, unit * a)
    own = a * F(unit if own_unit is None else own_unit)
    centred = steps.Deviations(a, pivot * a, own, True)
    with np.errstate(over="ignore"):
        got = steps.finish(s, centred, numpy_adapter, epsilon, may_be_empty=empty)
    return steps.Coefficients(*(float(np.asarray(v).ravel()[0]) for v in got))


def test_coefficients():
    got = finished(32.0, unit=2.0, residual=0.5, epsilon=1.0)
    # Scaled by 2: variance 8, epsilon 4; the mean is 1.25 above the pivot.
    r = 1 / math.sqrt(8 + 4)
    np.testing.assert_allclose(got, (r, 2.5 * r, 2 * r, 0.25), rtol=1e-6)
    other = finished(32.0, unit=2.0, residual=0.5, epsilon=1.0, own_unit=0.5)
    np.testing.assert_allclose(other, (4 * r, 2.5 * r, 2 * r, 0.25), rtol=1e-6)
    np.testing.assert_allclose(
        finished(32.0, unit=2.0, residual=0.5, epsilon=1.0, empty=True), got, rtol=1e-7
    )


def test_coefficients_of_special_variances():
    assert finished(-1e-3).rstd == pytest.approx(1e3)  # rounding left a negative sum of squares
    assert math.isnan(finished(math.inf).rstd)
    assert math.isnan(finished(math.nan).rstd)
    assert finished(0.0, epsilon=0.0).rstd == 1
    assert finished(0.0, unit=8.0, epsilon=0.0).rstd == 8
    assert finished(4.0, epsilon=0.0).rstd == 1
    assert finished(0.0).rstd == pytest.approx(1e3)


def test_coefficients_without_an_epsilon_are_finite():
    """1 / standard deviation of subnormal data is not a float32."""
    half = 0.5 * LARGEST
    assert finished(1e-8, unit=1e37, epsilon=0.0).rstd == pytest.approx(half, rel=1e-6)
    assert finished(4e-2, unit=1e37, epsilon=0.0).rstd == pytest.approx(1e38, rel=1e-6)
    assert finished(1e-38 * 4, unit=0.5, epsilon=0.0).rstd == pytest.approx(0.5e19, rel=1e-5)
    got = finished(1e-8, unit=1e37, epsilon=0.0)
    assert got.gain == pytest.approx(2e4, rel=1e-5)
    assert got.shift == pytest.approx(2e41, rel=1e-5) or got.shift == math.inf


def test_coefficients_of_empty_groups():
    """The mean is 0 and the variance 1, whatever is stored."""
    got = finished(0.0, unit=4.0, count=0.0, mean=9.0, residual=5.0, epsilon=3.0, empty=True)
    assert got.rstd == 0.5
    assert got.inv_count == 0
    assert got.gain == 0.125
    assert got.shift == pytest.approx((0 - 2.0) * 4 * 0.125)
    one = finished(4.0, count=1.0, epsilon=0.0, empty=True)
    assert (one.rstd, one.inv_count, one.shift) == (0.5, 1, 0.5)


@pytest.mark.parametrize("keep", [True, False])
def test_normalizing(keep, adapter):
    x = np.arange(8, dtype=F).reshape(1, 2, 2, 2)
    plan, ones = plan_of((1, 2, 4)), np.ones((1, 1, 2, 2), F)
    scale, bias = (np.arange(4, dtype=F).reshape(1, 1, 2, 2) + i for i in (1, 5))
    centred = steps.Deviations(x.copy(), ones, ones, True)
    coefficients = steps.Coefficients(3 * ones, 0.5 * ones, ones, ones)
    y = steps.normalize(centred, coefficients, scale, bias, plan, adapter, keep_deviations=keep)
    np.testing.assert_array_equal(y, (x * 3 - 0.5) * scale + bias)
    assert np.shares_memory(y, centred.values) == (adapter is numpy_adapter and not keep)
    if keep or not adapter.overwrites:
        np.testing.assert_array_equal(centred.values, x)
    wide = steps.normalize(
        steps.Deviations(x, ones, ones, True), coefficients, scale.astype(float), bias, plan,
        adapter,
        keep_deviations=keep,
    )  # fmt: skip
    assert wide.dtype == float


# Backward -----------------------------------------------------------------------------------------


def backward(x, dy, scale, mask=None, *, replicas=None, overwrite=False, epsilon=EPSILON, copies=1):
    """Run all steps; return the gradients of two groups, flat per array."""
    plan = plan_of(x.shape)
    work, dy = x.reshape(plan.work_shape), dy.reshape(plan.work_shape)
    scale = scale.reshape(plan.parameter_shape)
    if mask is not None:
        mask = mask.reshape(plan.mask_shapes(mask.shape)[2])
    s, deviations = steps.measure(work, mask, plan, numpy_adapter, epsilon)
    s = s._replace(count=s.count * copies, m2=s.m2 * copies)
    c = steps.finish(s, deviations, numpy_adapter, epsilon, may_be_empty=mask is not None)
    if mask is not None:
        deviations = steps.saturate(deviations, mask, c, scale, plan, numpy_adapter)
    kept = deviations.values.copy()
    options = {"overwrite": True} if overwrite else {}
    got = pull_back(dy, mask, scale, deviations, c, plan, numpy_adapter, replicas, None, **options)
    if overwrite and mask is None and not np.iscomplexobj(x):
        factor = scale * c.rstd
        # The memory of the deviations is used again, for what is subtracted from dy.
        taken = (dy * np.conj(factor).reshape(plan.ungrouped(factor.shape))).real
        np.testing.assert_allclose(deviations.values, taken - got.x, atol=1e-5)
    if not overwrite:
        np.testing.assert_array_equal(deviations.values, kept)
    return got._replace(x=got.x.reshape(x.shape), scale=got.scale.ravel(), bias=got.bias.ravel())


def near(got, want, rtol=3e-6):
    assert got.shape == want.shape
    assert np.iscomplexobj(got) == np.iscomplexobj(want)
    assert np.abs(got - want).max() <= rtol * np.abs(want).max()


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kinds", ["rr", "rc", "cr", "cc"])
@pytest.mark.parametrize("positions", [5, 40])
def test_pulling_back(positions, kinds, masked, overwrite):
    """Real and complex x and scale; gradients of real arrays are real."""
    rng = np.random.default_rng(0)
    x, dy, scale = (
        rng.normal(2, size=shape) + (1j * rng.normal(1, size=shape) if kind == "c" else 0)
        for kind, shape in zip(
            kinds[0] + ("c" if "c" in kinds else "r") + kinds[1],
            ((2, positions, 4), (2, positions, 4), (4,)),
            strict=True,
        )
    )
    x, dy, scale = (a.astype(np.complex64 if np.iscomplexobj(a) else F) for a in (x, dy, scale))
    mask = rng.random((2, positions, 1)) < 0.7 if masked else None
    got = backward(x, dy, scale, mask, overwrite=overwrite)
    want = oracle.group_norm_gradients(x, dy, scale, scale, num_groups=2, mask=mask)
    near(got.x, want.x)
    near(got.scale if kinds[1] == "c" else got.scale.real, want.scale)
    near(got.bias if kinds[1] == "c" else got.bias.real, want.bias)
    # Two replicas with the same elements.
    both = Replicas(0, 2, lambda sums: 2 * sums)
    again = backward(x, dy, scale, mask, replicas=both, overwrite=overwrite, copies=2)
    near(again.x, want.x)
    near(again.scale, got.scale)


def test_what_is_masked_out_does_not_reach_the_gradients_of_others():
    """However large it is, and though the valid elements all equal their mean."""
    x, dy = np.full((1, 40, 4), 7, F), np.ones((1, 40, 4), F)
    mask = np.ones((1, 40, 1), bool)
    mask[0, 3], x[0, 3] = False, -3e38
    dy[0, 3] = [1e5, 1e5, -1e5, -1e5]
    with np.errstate(over="ignore", invalid="ignore"):
        got = backward(x, dy, np.ones(4, F), mask, epsilon=1e-30)
    assert np.isfinite(got.x).all()
