"""The accuracy contract: float32 accuracy for any data, on every library, compiled or not."""

import importlib
import math

import numpy as np
import pytest

from groupnorm import group_norm, group_norm_vjp, group_statistics, normalize
from groupnorm.testing import oracle
from tests.rows import (
    CONTRACT,
    CONTRACT_64,
    ROWS,
    assert_close,
    assert_gradient,
    assert_result,
    call_with_arrays,
    differentiate,
    host_dtype,
    run,
)

OFFSETS = [0, 1, 1e2, 1e3, 1e4, 1e5]
# (feature axis, shape). Some have more than 256 positions, so that sums are computed in blocks.
LAYOUTS = {
    "last": (-1, (2, 16, 17, 64)),
    "first": (1, (2, 64, 16, 17)),
    "last, few positions": (-1, (4, 3, 64)),
    "unbatched": (0, (64, 90)),
}
COMPILED_LAYOUTS = ["last", "first"]
GROUPS = 8


def from_channels_last(x, feature_axis):
    return np.ascontiguousarray(np.moveaxis(x, -1, feature_axis))


def make_mask(rng, shape, feature_axis):
    """Return a mask over the positions of every sample, the same for all channels."""
    mask_shape = list(shape)
    mask_shape[feature_axis] = 1
    return rng.random(mask_shape) < 0.7


def compiled_call(backend, **keywords):
    """Return `group_norm`, compiled once for the common shape of all the data in one test."""
    return backend.compiled(lambda x, mask: group_norm(x, mask=mask, **keywords))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_offset(any_backend, layout, fast, masked, rng):
    if any_backend.name == "torch:compile" and layout not in COMPILED_LAYOUTS:
        pytest.skip("compiling is slow; two layouts are enough there")
    feature_axis, shape = LAYOUTS[layout]
    keywords = {"num_groups": GROUPS, "feature_axis": feature_axis}
    noise = rng.normal(size=shape)
    mask = make_mask(rng, shape, feature_axis) if masked else None
    call = compiled_call(any_backend, use_fast_variance=fast, **keywords)
    given_mask = any_backend.asarray(mask) if masked else None
    for offset in OFFSETS:
        x = (offset + noise).astype(np.float32)
        y = any_backend.to_numpy(call(any_backend.asarray(x), given_mask))
        reference = oracle.group_norm(x, mask=mask, **keywords)
        try:
            assert_close(y, reference, tolerance=CONTRACT)
        except AssertionError as error:
            raise AssertionError(f"offset {offset:g}: {error}") from error


@pytest.mark.parametrize("offset", [1e4, 1e5])
@pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])
def test_offsets_of_small_images(backend, axis, offset, rng):
    """All peers: 1e-3 at best; flax, torch channels_last, keras, ONNX, paddle: 1e3 or NaN."""
    shape = (2, 8, 10, 10) if axis == 1 else (2, 10, 10, 8)
    x = (rng.normal(size=shape) + offset).astype(np.float32)
    result = run(backend, x, num_groups=4, feature_axis=axis)
    assert_result(backend, result, oracle.group_norm(x, num_groups=4, feature_axis=axis))


def spike(first):
    def make(rng, shape):
        x = rng.normal(size=shape)
        x.reshape(shape[0], -1, shape[-1])[:, 0 if first else 101, :: 1 if first else 3] = 1e3
        return x

    return make


def channel_means(size):
    return lambda rng, shape: (
        rng.normal(size=shape) + size * np.where(np.arange(shape[-1]) % 2, 1, -1)
    )


DATA = {
    "spike in the first position": spike(first=True),
    "spike elsewhere": spike(first=False),
    "one element": lambda rng, shape: np.eye(1, np.prod(shape)).reshape(shape) * 1e3,
    "ramp": lambda rng, shape: np.linspace(0, 1e4, np.prod(shape)).reshape(shape),
    "sorted": lambda rng, shape: np.sort(rng.normal(size=np.prod(shape))).reshape(shape),
    "lognormal": lambda rng, shape: rng.lognormal(sigma=3, size=shape),
    "channel means of +-1e5": channel_means(1e5),
    "channel means of +-1e3 at offset 1e5": lambda rng, shape: 1e5 + channel_means(1e3)(rng, shape),
    "uniform integers": lambda rng, shape: rng.integers(0, 256, size=shape),
    "half of it zero": lambda rng, shape: np.maximum(rng.normal(size=shape), 0),
    "image border": lambda rng, shape: (
        np.where(np.arange(shape[2])[:, None] == 0, 1e3, 1) * rng.normal(size=shape)
    ),
    "heavy tails": lambda rng, shape: rng.standard_t(1.5, size=shape),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("layout", COMPILED_LAYOUTS)
def test_difficult_data(any_backend, layout, fast, masked, rng):
    feature_axis, shape = LAYOUTS[layout]
    keywords = {"num_groups": GROUPS, "feature_axis": feature_axis}
    mask = make_mask(rng, shape, feature_axis) if masked else None
    given_mask = any_backend.asarray(mask) if masked else None
    call = compiled_call(any_backend, use_fast_variance=fast, **keywords)
    failures = []
    for name, make in DATA.items():
        x = from_channels_last(make(rng, LAYOUTS["last"][1]).astype(np.float32), feature_axis)
        y = any_backend.to_numpy(call(any_backend.asarray(x), given_mask))
        try:
            assert_close(y, oracle.group_norm(x, mask=mask, **keywords), tolerance=CONTRACT)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("offset", [0, 1e5, 1e10])
def test_offsets_in_float64(backend, offset, fast, rng):
    x = offset + rng.normal(size=(2, 17, 18, 16))
    with backend.precision("float64"):
        result = run(backend, x, num_groups=4, use_fast_variance=fast)
        reference = exact_float64_reference(x)
        # At 1e10 even the exact mean rounded to float64 is too coarse for a float64 oracle.
        assert_result(backend, result, reference, dtype="float64", tolerance=10 * CONTRACT_64)


def exact_float64_reference(x):
    """Normalize channels-last data in four groups with 80-bit floats."""
    wide = x.astype(np.longdouble)
    out = np.empty_like(wide)
    for sample in range(x.shape[0]):
        for first in range(0, x.shape[-1], x.shape[-1] // 4):
            where = (sample, ..., slice(first, first + x.shape[-1] // 4))
            deviation = wide[where] - wide[where].mean()
            deviation -= deviation.mean()
            out[where] = deviation / np.sqrt((deviation**2).mean() + np.longdouble(1e-6))
    return out.astype(np.float64)


def test_float64_is_computed_in_float64(backend, rng):
    """paddle on CPU: float32 only."""
    with backend.precision("float64"):
        x = rng.normal(size=(2, 5, 6)) + 1e4
        result = run(backend, x, num_groups=3)
        want = oracle.group_norm(x, num_groups=3)
        assert_result(backend, result, want, dtype="float64", tolerance=1e-11)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-40, 0])
@pytest.mark.parametrize("size", [1e20, 1e-20])
def test_huge_and_tiny_data(backend, size, epsilon, fast, rng):
    """Squares of 1e20 overflow float32, those of 1e-20 underflow; results are neither inf nor 0."""
    x = (size * rng.normal(size=(2, 300, 8))).astype(np.float32)
    keywords = {"num_groups": 2, "epsilon": epsilon}
    y = run(backend, x, use_fast_variance=fast, **keywords).values
    reference = oracle.group_norm(x, **keywords)
    largest = np.abs(reference).max()
    # Relative, because the output is about 1e-17 where epsilon is much larger than the variance.
    assert_close(y / largest, reference / largest, tolerance=CONTRACT)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e-40), ("float64", 1e-310)])
def test_subnormal_data_without_an_epsilon(quick_backend, dtype, size, masked, rng):
    """1 / standard deviation exceeds the dtype's range, and so do the gradients; results do not."""
    x = (size * rng.normal(size=(2, 30, 8))).astype(dtype)
    x[:, :, :2] *= 1e10  # ordinary numbers in one of the groups
    mask = rng.random((2, 30, 1)) < 0.7 if masked else None
    for epsilon in (0.0, size**2):  # in proportion to the variance, but 0 for the smallest
        result = run(
            quick_backend, x, num_groups=4, epsilon=epsilon, mask=mask, implementation="portable"
        )
        # A power of two is exact, and changes nothing.
        power = 120 if dtype == "float32" else 1000
        ordinary = np.ldexp(x.astype(np.float64), power)
        scaled = math.ldexp(epsilon, 2 * power)
        want = oracle.group_norm(ordinary, num_groups=4, epsilon=scaled, mask=mask)
        tolerance = CONTRACT if dtype == "float32" else CONTRACT_64
        assert_result(quick_backend, result, want, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("size", [1e15, 1e-15])
def test_gradients_of_huge_and_tiny_data(backend, size, rng):
    x = (size * rng.normal(size=(2, 300, 8))).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)

    def gradient(x, dy):
        return group_norm_vjp(x, num_groups=2, epsilon=0)[1](dy).x

    dx, _ = call_with_arrays(backend, gradient, x=x, dy=dy)
    want = oracle.group_norm_gradients(x, dy, num_groups=2, epsilon=0).x
    largest = np.abs(want).max()
    assert_close(backend.to_numpy(dx) / largest, want / largest, tolerance=CONTRACT)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-30])
@pytest.mark.parametrize("differing", [0, 40])
@pytest.mark.parametrize(
    ("dtype", "power"), [("bfloat16", 60), ("float32", 20), ("float32", 120), ("float64", 1000)]
)
def test_huge_data_that_is_nearly_constant(
    backend, dtype, power, differing, epsilon, rng, needs_bfloat16
):
    """A sample of it is constant, and squares of one rounding overflow in the scale of epsilon."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend} has no {dtype}")
    x = np.ones((2, 1021, 8))
    eps = {"bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}[dtype]
    for group in (x[:, :, :4], x[:, :, 4:]):
        at = np.unravel_index(rng.choice(group.size, differing, replace=False), group.shape)
        group[at] += eps * rng.integers(1, 9, size=differing)
    with backend.precision(dtype):
        given = np.ldexp(x, power).astype(host_dtype(dtype))
        dy = rng.normal(size=x.shape).astype(given.dtype)
        got = differentiate(backend, given, dy, num_groups=2, epsilon=epsilon)
    if differing:  # a power of two and a constant are exact, and change nothing
        x = x - 1
    else:
        x, power = given, 0
    keywords = {"num_groups": 2, "epsilon": math.ldexp(epsilon, -2 * power)}
    want = oracle.group_norm(x, **keywords)
    tolerance = {"bfloat16": 2.0**-7, "float64": 10 * CONTRACT_64}.get(dtype, CONTRACT)
    assert_close(got.y, want, tolerance=tolerance)
    want = oracle.group_norm_gradients(x, dy, **keywords).x
    got_dx = np.ldexp(got.x.astype(np.float64), power)
    assert_gradient(got_dx, want, rtol=tolerance)


def test_small_values_among_zeros_without_epsilon(quick_backend, rng):
    x = np.zeros((1, 4096, 4), np.float32)
    x[0, rng.integers(0, 4096, 6)] = 1e-20
    y = group_norm(quick_backend.asarray(x), num_groups=2, epsilon=0)
    want = oracle.group_norm(x, num_groups=2, epsilon=0)
    np.testing.assert_allclose(quick_backend.to_numpy(y), want, rtol=5e-6, atol=5e-6)


def constants(rng):
    named = [
        0,
        1,
        -1,
        0.1,
        1 / 3,
        1e-3,
        123.456,
        65504,
        1e5 + 0.1,
        2**24 + 2,
        1e10,
        1e20,
        -1e20,
        1e-20,
        1e30,
    ]
    magnitudes = 10 ** rng.uniform(-6, 12, size=65)
    return np.concatenate([named, magnitudes * rng.choice([-1, 1], size=65)]).astype(np.float32)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("layout", ["last", "first", "few positions", "one group"])
def test_constants_give_exactly_the_bias(any_backend, layout, fast, masked, rng, pytestconfig):
    """Eighty constants, one per sample; no count is a power of 2, so a rounded mean would show."""
    if any_backend.name == "torch:compile" and layout not in COMPILED_LAYOUTS:
        pytest.skip("compiling is slow; two layouts are enough there")
    shape, axis, groups = {
        "last": ((7, 43, 12), -1, 4),
        "first": ((12, 7, 43), 1, 4),
        "few positions": ((3, 10), -1, 2),
        "one group": ((7, 11, 6), -1, 1),
    }[layout]
    values = constants(rng)
    if pytestconfig.getoption("interpret"):  # seconds for each
        values = rng.choice(values, 20, replace=False)
    channels = shape[axis if axis < 0 else 0]
    x = np.broadcast_to(values.reshape(-1, *(1 for _ in shape)), (len(values), *shape)).copy()
    mask = None
    if masked:
        mask = make_mask(rng, x.shape, axis)
        x = np.where(mask, x, rng.normal(size=x.shape)).astype(np.float32)
    bias = rng.normal(size=channels).astype(np.float32)
    scale = rng.uniform(0.5, 1.5, size=channels).astype(np.float32)
    epsilons = [1e-6] if any_backend.name == "torch:compile" else [1e-6, 0]
    for epsilon in epsilons:
        y = run(
            any_backend,
            x,
            scale,
            bias,
            mask=mask,
            num_groups=groups,
            feature_axis=axis,
            epsilon=epsilon,
            use_fast_variance=fast,
        ).values
        spread = bias if axis == -1 else bias[:, None, None]
        expected = np.broadcast_to(spread, x.shape)
        valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
        wrong = ((y != expected) & valid).reshape(len(values), -1).any(axis=1)
        assert not wrong.any(), f"epsilon {epsilon}: constants {values[wrong].tolist()}"


def test_a_different_constant_in_each_group(any_backend, rng):
    """Each group has a different constant, so a sum over the whole sample would be wrong."""
    values = constants(rng)[:64]
    x = np.broadcast_to(np.repeat(values, 3), (2, 7, 41, 192)).copy()
    result = run(any_backend, x, num_groups=64)
    assert_result(any_backend, result, np.zeros(x.shape), tolerance=0)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
def test_results_are_reproducible_bit_for_bit(any_backend, fast, rng):
    x = (10 + rng.normal(size=(2, 33, 34, 32))).astype(np.float32)
    call = compiled_call(any_backend, num_groups=4, use_fast_variance=fast)
    first, second = (any_backend.to_numpy(call(any_backend.asarray(x), None)) for _ in range(2))
    np.testing.assert_array_equal(first.view(np.int32), second.view(np.int32))


@pytest.mark.needs("torch")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("feature_axis", [-1, 1])
def test_torch_bits_do_not_depend_on_the_thread_count(feature_axis, compiled, rng):
    torch = importlib.import_module("torch")
    backend = ROWS["torch:compile"] if compiled else ROWS["torch"]
    x = (1e2 + rng.normal(size=(1, 128, 64, 128))).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    before = torch.get_num_threads()

    def forward_and_gradient(x, dy):
        y, pullback = group_norm_vjp(x, num_groups=2, feature_axis=feature_axis)
        return y, pullback(dy).x

    outputs = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            out, _ = call_with_arrays(backend, forward_and_gradient, x=x, dy=dy)
            outputs.append([a.numpy().view(np.int32) for a in out])
    finally:
        torch.set_num_threads(before)
        torch._dynamo.reset()
    for other in outputs[1:]:
        np.testing.assert_array_equal(outputs[0][0], other[0])
        np.testing.assert_array_equal(outputs[0][1], other[1])


BIG_ROWS = [ROWS["numpy"], ROWS["jax:jit"], ROWS["torch"], ROWS["mlx"]]


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("feature_axis", [-1, 1])
def test_a_group_of_2_to_the_24_elements(backend, feature_axis, fast, rng):
    if backend not in BIG_ROWS:
        pytest.skip("one row per library is enough for a group of this size")
    shape = (1, 1 << 18, 64) if feature_axis == -1 else (1, 64, 1 << 18)
    x = rng.standard_normal(size=shape, dtype=np.float32) + np.float32(1e3)
    y = run(backend, x, num_groups=1, feature_axis=feature_axis, use_fast_variance=fast).values
    wide = x.astype(np.float64)
    wide -= wide.mean()
    wide -= wide.mean()
    wide /= np.sqrt(np.mean(wide**2) + 1e-6)
    assert_close(y, wide, tolerance=CONTRACT)


def test_constant_data_of_extended_precision_without_an_epsilon():
    """Its smallest normal number is 0 as a Python float."""
    x = np.full((2, 5, 8), 3, np.longdouble)
    statistics = group_statistics(x, num_groups=4)
    assert (statistics.mean == 3).all()
    assert (statistics.m2 == 0).all()
    np.testing.assert_array_equal(normalize(x, statistics, num_groups=4), 0)
