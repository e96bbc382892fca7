"""The compiled core itself compared with float64: sizes around its blocks, each kind of argument.

`test_instruction_sets.py` runs this file with each instruction set.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from groupnorm.backends.kernels.erfc import ERFC_POWERS
from tests.kernels.core import INPUT_GRADIENT, NORMALIZE, SUM, Call, check, needs_core
from tests.portable.test_activation import act, slope
from tests.rows import host_dtype

core = needs_core()
each_layout = pytest.mark.parametrize("first", [True, False], ids=["first", "last"])

# Samples, groups, channels of a group, positions. One of each; a few; then lengths around vectors,
# the 64 elements that are sampled, blocks of 2048, bands of 512, chunks of 256 rows and of 65536
# elements, runs of 128 bands, spans of 512 positions.
SIZES = [
    (1, 1, 1, 1), (2, 2, 1, 3), (3, 5, 2, 1), (20, 3, 17, 1), (33, 2, 40, 1), (2, 1, 5000, 1),
    (3, 5, 2, 5), (2, 3, 2, 9), (2, 2, 2, 24), (1, 1, 2, 35), (9, 2, 3, 70), (2, 2, 1, 64),
    (2, 1, 3, 2049), (1, 2, 2, 4100), (1, 1, 1, 66000), (1, 3, 100, 300), (1, 2, 600, 33),
    (40, 2, 2, 100), (600, 1, 2, 3), (8, 2, 16, 2500),
]  # fmt: skip
OPTIONS = [
    {}, {"offset": 1e5}, {"masked": "one", "rows": True}, {"offset": 1e5, "masked": "each"},
    {"activation": "relu", "rows": True}, {"activation": "silu", "masked": "each"},
    {"activation": "gelu", "parameters": False}, {"activation": "silu", "offset": 1e5},
    {"epsilon": 0.5, "activation": "gelu", "masked": "one"},
    {"x": "float16", "offset": 20.0, "masked": "each", "activation": "relu"},
    {"x": "bfloat16", "activation": "silu"}, {"x": "bfloat16", "y": "float32", "rows": True},
    {"x": "float16", "y": "bfloat16"}, {"x": "float32", "y": "float16", "masked": "one"},
    {"x": "float16", "y": "float32", "dy": "float16"},
]  # fmt: skip


# A third of all pairs.
PAIRS = [(s, o) for i, s in enumerate(SIZES) for j, o in enumerate(OPTIONS) if (i + j) % 3 == 0]


@pytest.mark.parametrize(("sizes", "options"), PAIRS, ids=str)
@each_layout
def test_forward_and_backward(first, sizes, options):
    Call(sizes, first=first, **options).check(threads=3)


@each_layout
@pytest.mark.parametrize("positions", [*range(2, 20), 31, 32, 33, 63, 65, 127, 129])
def test_every_rest_of_a_vector(positions, first):
    for channels in (1, 3, 7, 16, 33):
        masked = ("each", "one", None)[positions % 3]
        Call((2, 1, channels, positions), first=first, masked=masked, activation="silu").check()


@each_layout
@pytest.mark.parametrize("positions", [1, 6])
@pytest.mark.parametrize("batches", [1, 2, 3, 6])
def test_batches_have_gradients_of_their_own(batches, positions, first):
    Call((6, 2, 2, positions), first=first).check(batches=batches)


# Statistics ---------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("masked", [None, "each"])
@pytest.mark.parametrize("size", [1e-25, 1e-17, 1e17, 1e25])
@pytest.mark.parametrize("sizes", [(2, 2, 3, 9), (2, 2, 3, 1), (1, 1, 2, 5000)], ids=str)
def test_squares_out_of_range(sizes, size, masked, first):
    """The variance is outside of what float32 can hold, or nearly so: then it is of float64."""
    call = Call(sizes, first=first, masked=masked, epsilon=0.0)
    call.x = (call.x * np.float32(size)).astype(np.float32)
    check(call.forward(), call.want_y(), "float32")


@each_layout
@pytest.mark.parametrize("masked", [None, "each"])
def test_statistics_far_from_zero(masked, first):
    """Means and variances are of float64 accuracy: squares of means would not be."""
    call = Call((2, 2, 2, 3000), first=first, masked=masked, epsilon=0.0)
    noise = np.floor(9 * np.random.default_rng(0).random(call.x.shape))
    call.x = (2.0**23 + noise).astype(np.float32)
    call.forward()
    mean, rstd, inv_count = call.statistics
    for n in range(2):
        valid = slice(None) if masked is None else call.mask[n]
        for group in range(2):
            values = call.x[n, 2 * group : 2 * group + 2][:, valid].astype(np.float64)
            np.testing.assert_allclose(mean[n, group], values.mean(), rtol=1e-14)
            np.testing.assert_allclose(rstd[n, group], 1 / values.std(), rtol=1e-6)
            assert inv_count[n, group] == 1 / values.size


STEPS = {
    "drift": lambda i: 50.0 + i,  # by one standard deviation for each block: the centre follows
    "leap": lambda i: 1e4 * (i + 1),  # each block is far from the mean of the one before
    "late leap": lambda i: np.where(i < 5, 0.0, 1e6),
}


@each_layout
@pytest.mark.parametrize("masked", [None, "one"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("block", [2048, 256, 10])
def test_poor_centres(block, steps, masked, first):
    """No order of the data misleads the centre about which a block is measured."""
    call = Call((1, 1, 2, 8 * block), first=first, masked=masked)
    level = STEPS[steps](np.arange(8 * block) // block)
    call.x = (level + np.random.default_rng(1).normal(size=call.x.shape)).astype(np.float32)
    check(call.forward(), call.want_y(), "float32")


@each_layout
@pytest.mark.parametrize(
    ("positions", "front"),
    [*((3000, n) for n in (1, 8, 63, 64, 300)), (129, 1), (128, 1), (128, 100), (10, 1), (10, 6)],
)
@pytest.mark.parametrize("value", [20.0, 1e4, -1e7])
def test_outliers_in_front_are_no_centre(value, positions, front, first):
    call = Call((1, 2, 2, positions), first=first)
    call.x[:, :, :front] = value
    check(call.forward(), call.want_y(), "float32")


@each_layout
@pytest.mark.parametrize("masked", [None, "each"])
@pytest.mark.parametrize("sizes", [(1, 2, 2, 20), (2, 3, 2, 1), (1, 1, 1, 5000)], ids=str)
def test_constant_data_gives_exactly_the_bias(sizes, masked, first):
    for value in (0.1, -3.3e7, 1e30, 0.0):
        call = Call(sizes, first=first, masked=masked, epsilon=0.0)
        call.x[...] = np.float32(value)
        y = call.forward()
        np.testing.assert_array_equal(y, np.broadcast_to(call.bias[:, :, None], y.shape))
        np.testing.assert_array_equal(call.statistics[0], np.float32(value))
        np.testing.assert_array_equal(call.statistics[1], 1)


@each_layout
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sizes", [(2, 2, 2, 20), (2, 2, 20, 1), (2, 2, 1, 3000)], ids=str)
def test_non_finite_values_stay_in_their_group(sizes, bad, first):
    call = Call(sizes, first=first)
    call.x[0, 0, -1] = bad
    y = call.forward().reshape(4, -1)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1:]).all()
    dx = call.backward()[0].reshape(4, -1)
    assert np.isfinite(dx[1:]).all()


# Masks --------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("positions", [1, 6, 3000])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_samples_without_a_valid_element(activation, positions, first):
    call = Call(
        (2, 2, 2, positions), first=first, masked="each", epsilon=3.0, activation=activation
    )
    call.mask[0], call.mask[1] = False, True
    call.check()
    mean, rstd, inv_count = call.statistics
    assert (inv_count[0] == 0).all()
    assert (rstd[0] == 0.5).all()  # 1 / sqrt(1 + epsilon)
    assert (mean[0] == 0).all()


@each_layout
@pytest.mark.parametrize("valid", [700, 2047, 2048, 5000 - 1])
def test_the_first_valid_element_may_come_late(valid, first):
    call = Call((2, 1, 2, 5000), first=first, masked="one", offset=20.0)
    call.mask[:, :valid] = False
    call.check()


@each_layout
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
def test_what_is_masked_out_may_be_of_any_size(activation, first):
    call = Call((1, 1, 2, 6), first=first, masked="one", epsilon=0.0, activation=activation)
    call.mask[0] = [True, False, True, False, False, True]
    call.x[0, :, 1], call.x[0, :, 3] = [np.nan, np.inf], [3e38, -3e38]
    call.x[0, :, 4] = [-np.inf, 2.0]
    call.dy[0, :, 3] = 0  # such elements have no cotangent, but those replaced by 0 have
    given, replaced = call.x, np.where(np.isfinite(call.x), call.x, 0)
    y = call.forward()
    got = call.backward()
    call.x = np.where(np.abs(replaced) > 1e30, 0, replaced)
    assert np.isfinite(y).all()
    if activation is None:
        assert (np.abs(y[0, :, 3]) > 1e30).all()
        np.testing.assert_array_equal(np.sign(y[0, :, 3]), [1, -1])
    ordinary = [0, 1, 2, 4, 5]
    check(y[..., ordinary], call.want_y()[..., ordinary], "float32")
    call.check_gradients(got, x=given)


# Elements -----------------------------------------------------------------------------------------


STANDARD = np.float64([0, 1, 1]).reshape(3, 1, 1)  # mean, 1 / standard deviation, 1 / count


def normalized(call, x):
    """Normalize x, in the order of memory, by mean 0 and standard deviation 1."""
    call.x = call.shaped(x.reshape(call.flat(call.x).shape), call.dtypes[0])
    y = call.empty(call.dtypes[1])
    call.stage(NORMALIZE, np.repeat(STANDARD, call.sizes[0], 1), y)
    return y.reshape(-1).view(host_dtype(call.dtypes[1]))


HALVES = ("float16", "bfloat16")


@pytest.mark.parametrize("layout", ["one position", "first", "last"])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_widened_and_narrowed_exactly(dtype, layout):
    """All 65536 values: to float32, from float32, and from itself."""
    every = np.arange(1 << 16, dtype=np.uint16).view(host_dtype(dtype))
    wide = every.astype(np.float32)
    nan = np.isnan(wide)
    for x, result in ((every, "float32"), (wide, dtype), (every, dtype)):
        source = "float32" if x is wide else dtype
        sizes = (1 << 16, 1, 1, 1) if layout == "one position" else (1, 1, 4, 1 << 14)
        call = Call(sizes, first=layout == "first", x=source, y=result, parameters=False)
        got = normalized(call, x)
        want = wide if result == "float32" else every
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
        # -0 becomes 0, as a bias of 0 is added.
        positive = np.where(wide == 0, 0, bits(want))
        np.testing.assert_array_equal(bits(got)[~nan], positive[~nan])


def bits(a):
    return a.view({2: np.uint16, 4: np.uint32}[a.dtype.itemsize])


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_nearest_even(dtype):
    """The values between neighbours: the middle, and the float32 values next to it; overflow."""
    every = np.arange(1 << 16, dtype=np.uint16).view(host_dtype(dtype)).astype(np.float32)
    finite = np.unique(every[np.isfinite(every)])
    middle = (finite[1:].astype(np.float64) + finite[:-1]) / 2
    x = np.concatenate(
        [
            f.astype(np.float32)
            for f in (middle, np.nextafter(np.float32(middle), np.float32(np.inf)),
                      np.nextafter(np.float32(middle), np.float32(-np.inf)))
        ]
        + [np.float32([65519, 65520, 65536, 3.38e38, 3.3999e38, 3.4e38, np.inf, -np.inf, 1e-45])]
    )  # fmt: skip
    x = np.concatenate([x, np.zeros(-len(x) % 4, np.float32)])
    call = Call((1, 1, 1, len(x)), first=True, y=dtype, parameters=False)
    got = normalized(call, x)
    with np.errstate(over="ignore", under="ignore"):
        want = x.astype(host_dtype(dtype))
    # -0 becomes 0 before it is rounded; a small negative value may round to -0.
    zero = x == 0
    np.testing.assert_array_equal(bits(got)[~zero], bits(want)[~zero])
    assert not bits(got)[zero].any()


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_and_derivatives(activation):
    z = np.concatenate([np.linspace(-9, 9, 499), [0, -30, 30, 85, -86, 2.0**-126]])
    z = np.concatenate([z, np.zeros(-len(z) % 64)]).astype(np.float32)
    call = Call((1, 1, 1, len(z)), first=True, activation=activation, parameters=False)
    wide = z.astype(np.float64)
    got = normalized(call, z).astype(np.float64)
    assert (np.abs(got - act(wide, activation)) <= 4e-7 * np.maximum(1, np.abs(wide))).all()
    got = derivative(call, z)
    kink = (z == 0) & (activation == "relu")
    assert (np.abs(got - slope(wide, activation)) <= 6e-7)[~kink].all()


def derivative(call, z):
    """Return activation'(z): dx by mean 0, standard deviation 1, and means of 0."""
    call.x = z.reshape(call.x.shape)
    dx = call.empty("float32")
    call.stage(INPUT_GRADIENT, STANDARD, dx, np.ones_like(call.x), np.zeros((2, 1, 1)))
    return dx.reshape(-1).astype(np.float64)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_far_from_zero(activation):
    z = np.float32([1e30, np.inf, -1e30, -np.inf, -88, -100, -200, 3e38, np.nan])
    call = Call((1, 1, 1, len(z)), first=True, activation=activation, parameters=False)
    got = normalized(call, z)
    np.testing.assert_array_equal(got[[0, 1, 7]], z[[0, 1, 7]])
    np.testing.assert_allclose(got[2:7], 0, atol=2e-36)
    assert np.isnan(got[8])
    want = [1, 0, 0, 0, 0, 1]
    found = derivative(call, z)
    np.testing.assert_allclose(found[[0, 2, 4, 5, 6, 7]], want, atol=1e-34)
    assert np.isnan(found[8])
    # Of an infinite value the derivative is finite, though not dx.
    for value, want in ((np.inf, 1), (-np.inf, 0)):
        call.x[...] = value
        sums = np.zeros((2, 1, 1))
        call.stage(SUM, STANDARD, None, np.ones_like(call.x), sums)
        np.testing.assert_allclose(sums[0, 0, 0], want * len(z), atol=1e-34)


@each_layout
@pytest.mark.parametrize("positions", [1, 50])
def test_factors_are_finite(positions, first):
    """A factor of inf would make elements equal to the mean NaN."""
    call = Call((1, 1, 50, positions), first=first, epsilon=0.0)
    call.x[...] = 0
    call.x[0, :, 0] = np.where(np.arange(50) % 2, 1e-36, -1e-36)
    call.scale[...], call.bias[...] = 3e38, 1
    y = call.forward()
    assert not np.isnan(y).any()
    assert (y[..., 1:] == 1).all()


def test_the_coefficients_of_erfc_are_those_of_python():
    source = Path(core.__file__).with_name("core") / "activations.hpp"
    if not source.exists():
        pytest.skip("the sources of the core are not in a wheel")
    [listed] = re.findall(r"ERFC_POWERS\[(?:\d+)\] = \{([^}]*)\}", source.read_text())
    numbers = [np.float32(text.strip().rstrip("f")) for text in listed.split(",") if text.strip()]
    assert numbers == [np.float32(power) for power in ERFC_POWERS]
