"""Masks: all shapes and kinds, non-finite padding, groups without valid elements, gradients."""

import importlib
import itertools

import numpy as np
import pytest

import groupnorm
from groupnorm.testing import oracle
from tests.portable.test_activation import reference_gradients
from tests.rows import (
    CONTRACT,
    GRADIENT,
    assert_close,
    assert_gradient,
    assert_gradients,
    assert_result,
    differentiate,
    host_dtype,
    place,
    run,
)

SHAPE = (3, 4, 5, 6)
FULL_SHAPES = [
    tuple(n if use else 1 for n, use in zip(SHAPE, uses, strict=True))
    for uses in itertools.product([False, True], repeat=4)
]
# All shapes that broadcast, those with fewer axes than x too.
SHORT_SHAPES = sorted({shape[missing:] for shape in FULL_SHAPES for missing in range(1, 5)})
PADDING = [np.nan, np.inf, -np.inf]


def random_mask(rng, shape):
    """Return a mask with about two thirds True; both values occur if the size allows it."""
    mask = rng.random(shape) < 0.65
    if mask.size > 1:
        mask.flat[0], mask.flat[-1] = True, False
    return mask


def draw(rng, shape=SHAPE, axis=-1):
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    sizes = [shape[a] for a in np.atleast_1d(axis)]
    scale = rng.uniform(0.5, 1.5, size=sizes).astype(np.float32)
    return x, dy, scale, rng.normal(size=sizes).astype(np.float32)


def poison(x, mask):
    """Put NaN, inf and -inf where the mask is False."""
    x = x.copy()
    out = np.flatnonzero(~np.broadcast_to(mask, x.shape))
    x.flat[out] = np.resize(PADDING, out.size)
    return x


@pytest.mark.parametrize("shape", FULL_SHAPES + SHORT_SHAPES, ids=str)
def test_every_broadcastable_shape(backend, shape, rng):
    """linen: a mask of shape (..., 1) raises. keras: masks are ignored."""
    x, _, scale, bias = draw(rng)
    mask = random_mask(rng, shape)
    x = poison(x, mask)
    result = run(backend, x, scale, bias, num_groups=2, mask=mask)
    reference = oracle.group_norm(x, scale, bias, num_groups=2, mask=mask)
    assert_result(backend, result, reference)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("along", list(itertools.product([0, 1], repeat=4)), ids=str)
def test_offsets_under_every_broadcastable_shape(quick_backend, along, fast, rng):
    """Masked-out elements are accurate too, even in channels without valid elements."""
    shape = (3, 8, 10, 12)  # enough positions for one pivot per channel
    mask = random_mask(rng, [n if use else 1 for n, use in zip(shape, along, strict=True)])
    noise = rng.normal(size=shape)
    for offset in (0, 1e3, 1e5):
        x = (offset + noise).astype(np.float32)
        result = run(quick_backend, x, num_groups=2, mask=mask, use_fast_variance=fast)
        assert_result(quick_backend, result, oracle.group_norm(x, num_groups=2, mask=mask))


@pytest.mark.parametrize("shape", FULL_SHAPES + SHORT_SHAPES, ids=str)
def test_gradients_for_every_broadcastable_shape(quick_backend, shape, rng):
    check_gradients(quick_backend, "vjp", rng, random_mask(rng, shape))


# Masks along the features, the positions, the batch, and all axes.
GRADIENT_MASKS = [(6,), (4, 1, 1), (3, 1, 1, 1), (3, 4, 5, 6), (3, 4, 5, 1)]


@pytest.mark.parametrize("feature_axis", [-1, 1])
@pytest.mark.parametrize("shape", GRADIENT_MASKS, ids=str)
@pytest.mark.parametrize("how", ["vjp", "autodiff"])
def test_gradients_of_differentiating_libraries(autodiff_backend, how, shape, feature_axis, rng):
    check_gradients(autodiff_backend, how, rng, random_mask(rng, shape), feature_axis)


KINDS = {
    "bool": lambda mask: mask,
    "uint8": lambda mask: mask.astype(np.uint8),
    "int32": lambda mask: mask.astype(np.int32),
    "float32": lambda mask: mask.astype(np.float32),
    "list of bools": lambda mask: mask.tolist(),
    "list of ints": lambda mask: mask.astype(int).tolist(),
    "list of floats": lambda mask: mask.astype(float).tolist(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_every_kind_of_mask(backend, kind, rng):
    mask = random_mask(rng, (4, 5, 1))
    check_gradients(backend, "vjp", rng, mask, given=KINDS[kind](mask))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_autodiff_under_every_kind_of_mask(autodiff_backend, kind, rng):
    mask = random_mask(rng, (4, 5, 1))
    check_gradients(autodiff_backend, "autodiff", rng, mask, given=KINDS[kind](mask))


@pytest.mark.parametrize("axes", [(-1,), (0, -1), (1, -1), (0, 1, 2, 3)], ids=str)
def test_gradients_with_reduction_axes(backend, axes, rng):
    mask = random_mask(rng, (3, 4, 1, 6))
    check_gradients(backend, "vjp", rng, mask, reduction_axes=axes)


@pytest.mark.parametrize("features", [(1, 3), (0, 2), (2, 3)], ids=str)
def test_gradients_with_two_feature_axes(backend, features, rng):
    # An even number of channels for every pair of feature axes, for two groups.
    mask = random_mask(rng, (4, 1, 5, 6))
    check_gradients(backend, "vjp", rng, mask, features, shape=(4, 4, 5, 6))


def check_gradients(backend, how, rng, mask, feature_axis=-1, *, given=None, shape=SHAPE, **more):
    x, dy, scale, bias = draw(rng, shape, feature_axis)
    x = poison(x, mask)
    keywords = {"num_groups": 2, "feature_axis": feature_axis, "epsilon": 1e-3, **more}
    passed = mask if given is None else given
    got = differentiate(backend, x, dy, scale, bias, how=how, mask=passed, **keywords)
    keywords["mask"] = mask
    assert_close(got.y, oracle.group_norm(x, scale, bias, **keywords), tolerance=CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    assert_gradients(got, want, rtol=1e-5)


@pytest.mark.parametrize("how", ["vjp", "autodiff"])
@pytest.mark.parametrize("padding", [*PADDING, 1e30])
def test_a_fully_masked_sample(autodiff_backend, how, padding, rng):
    """It has mean 0 and variance 1, does not affect other samples and makes no gradient NaN."""
    check_masked_sample(autodiff_backend, how, padding, rng)


@pytest.mark.parametrize("padding", [*PADDING, 1e30, None])
def test_a_fully_masked_sample_by_vjp(backend, padding, rng):
    """flax, brainstate: the scale's gradient is NaN for all channels; with NaN padding, all dx."""
    check_masked_sample(backend, "vjp", padding, rng)


def check_masked_sample(backend, how, padding, rng):
    x, dy, scale, bias = draw(rng)
    mask = np.arange(3).reshape(3, 1, 1, 1) != 1
    if padding is not None:  # otherwise ordinary values
        x[1] = padding
    keywords = {"num_groups": 2, "mask": mask}
    got = differentiate(backend, x, dy, scale, bias, how=how, **keywords)
    assert_close(got.y, oracle.group_norm(x, scale, bias, **keywords), tolerance=CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    rtol = 1e-5 if padding == 1e30 else 2e-6
    assert_gradients(got, want, rtol=rtol)


def test_a_fully_masked_group_is_not_scaled_up(quick_backend):
    x = quick_backend.asarray(np.full((1, 20, 4), 1e30, "f"))
    y = groupnorm.group_norm(x, num_groups=2, mask=False)
    np.testing.assert_allclose(quick_backend.to_numpy(y), 1e30, rtol=1e-6)


# Spread of the valid data, epsilon and scale: 1 / sqrt(var + epsilon), and the factor of the data,
# from 1 to 1e20.
FACTORS = {
    "ordinary": (1.0, 1e-6, 1.0),
    "small spread": (0.01, 1e-6, 1.0),
    "no spread": (0.0, 1e-12, 1.0),
    "tiny epsilon": (0.0, 1e-40, 1.0),
    "large scale": (1.0, 1e-6, 1e5),
    "huge scale": (1.0, 1e-6, 1e20),
}
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
CASES = [("float32", name) for name in FACTORS]
CASES += [(dtype, "ordinary") for dtype in DTYPES if dtype != "float32"]
CASES += [
    (dtype, name) for dtype in ("float64", "complex64") for name in FACTORS if name != "ordinary"
]


def check_finite_padding(backend, how, dtype, factors, activation, feature_axis, rng, **more):
    """The lowest and highest numbers where nothing is valid, with a cotangent of 0."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend} has no {dtype}")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy's bfloat16 comes from ml_dtypes")
    spread, epsilon, size = FACTORS[factors]
    dtype = host_dtype(dtype)
    shape = (2, 20, 4) if feature_axis == -1 else (2, 4, 20)
    x, dy = rng.normal(size=(2, *shape))
    scale = size * rng.uniform(0.5, 1.5, size=4).astype(np.float32)
    bias = rng.normal(size=4).astype(np.float32)
    if np.dtype(dtype).kind == "c":
        x, dy = (a + 1j * rng.normal(size=shape) for a in (x, dy))
    valid = np.arange(20) < 15
    valid = valid[:, None] if feature_axis == -1 else valid
    info = (importlib.import_module("ml_dtypes") if dtype.name == "bfloat16" else np).finfo(dtype)
    ends = np.asarray([info.min, info.max]).astype(dtype)
    if np.dtype(dtype).kind == "c":
        ends = np.concatenate([ends, 1j * ends, ends + 1j * ends, np.conj(ends - 1j * ends)])
    padding = np.resize(ends, shape)
    clean = np.where(valid, 3 + spread * x, 0).astype(dtype)
    padded, dy = np.where(valid, clean, padding), np.where(valid, dy, 0).astype(dtype)
    keywords = {"num_groups": 2, "feature_axis": feature_axis, "epsilon": epsilon}
    with backend.precision(dtype.name):
        got = differentiate(
            backend, padded, dy, scale, bias, how=how, mask=valid, dtype="input",
            activation=activation, **keywords, **more,
        )  # fmt: skip
    keywords["mask"] = valid
    if np.dtype(dtype).kind not in "fc":  # of ml_dtypes
        clean, dy = clean.astype(np.float64), dy.astype(np.float64)
    want = reference_gradients(clean, dy, scale, bias, activation, **keywords)
    rtol = 2e-2 if dtype.itemsize == 2 else 1e-4
    if dtype.itemsize > 2:  # half precision cannot represent it
        assert np.isfinite(got.y).all()
    assert_gradient(got.x, np.where(valid, want.x, 0), rtol=rtol)
    # With the same values everywhere, the gradient of scale is 0 but for rounding.
    assert np.isfinite(got.scale).all()
    if spread:
        assert_gradient(got.scale, want.scale, rtol=rtol)
    assert_gradient(got.bias, want.bias, rtol=rtol)


# NumPy says that the normalized padding exceeds float16.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("feature_axis", [-1, 1])
@pytest.mark.parametrize(("dtype", "factors"), CASES)
def test_finite_padding_leaks_into_no_gradient(backend, dtype, factors, feature_axis, rng):
    check_finite_padding(backend, "vjp", dtype, factors, None, feature_axis, rng)


@pytest.mark.parametrize(("dtype", "factors"), CASES)
def test_finite_padding_leaks_into_no_gradient_by_autodiff(autodiff_backend, dtype, factors, rng):
    check_finite_padding(autodiff_backend, "autodiff", dtype, factors, None, -1, rng)


@pytest.mark.parametrize("how", ["vjp", "autodiff"])
@pytest.mark.parametrize("implementation", [None, "portable"])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("factors", ["small spread", "no spread", "large scale"])
def test_finite_padding_before_an_activation(
    autodiff_backend, factors, activation, implementation, how, rng, pytestconfig
):
    several = pytestconfig.getoption("--jax-devices") > 1
    if implementation and autodiff_backend.library == "jax" and several:
        pytest.skip("with several JAX devices this is the default")
    check_finite_padding(
        autodiff_backend, how, "float32", factors, activation, -1, rng,
        implementation=implementation,
    )  # fmt: skip


NOTHING = {"bool": False, "list": [False], "ints": [[[0]]], "array": np.zeros((3, 1, 1, 6), bool)}
EVERYTHING = {
    "bool": True,
    "int": 1,
    "float": 1.0,
    "list": [[1.0]],
    "array": np.ones(SHAPE, np.int8),
}


@pytest.mark.parametrize("mask", NOTHING.values(), ids=NOTHING)
def test_everything_masked(backend, mask, rng):
    x, _, scale, bias = draw(rng)
    result = run(backend, x, scale, bias, num_groups=3, mask=mask)
    assert_result(backend, result, x.astype(float) / np.sqrt(1 + 1e-6) * scale + bias)


@pytest.mark.parametrize("mask", NOTHING.values(), ids=NOTHING)
def test_gradients_where_everything_is_masked(backend, mask, rng):
    """Then y = x / sqrt(1 + epsilon) * scale + bias, and non-finite input counts as 0."""
    x, dy, scale, bias = draw(rng)
    x[0, 0] = np.nan
    got = differentiate(backend, x, dy, scale, bias, num_groups=3, mask=mask)
    mask = np.zeros(SHAPE, bool)
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=3, mask=mask)
    assert (want.x[0, 0] == 0).all()
    assert_gradients(got, want, rtol=GRADIENT)


@pytest.mark.parametrize("mask", EVERYTHING.values(), ids=EVERYTHING)
def test_an_all_true_mask_changes_nothing(backend, mask, rng):
    x, _, scale, bias = draw(rng)
    result = run(backend, x, scale, bias, num_groups=3, mask=mask)
    assert_result(backend, result, oracle.group_norm(x, scale, bias, num_groups=3))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float32"])
def test_numeric_masks(wide_backend, dtype, rng):
    x, _, scale, bias = draw(rng)
    mask = random_mask(rng, (3, 4, 5, 1))
    x = poison(x, mask)
    result = run(wide_backend, x, scale, bias, num_groups=3, mask=mask.astype(dtype))
    assert_result(wide_backend, result, oracle.group_norm(x, scale, bias, num_groups=3, mask=mask))


@pytest.mark.parametrize("kind", [bool, int, float])
def test_nested_list_masks(wide_backend, kind, rng):
    x, _, scale, bias = draw(rng)
    mask = random_mask(rng, (4, 5, 1))
    x = poison(x, mask)
    result = run(wide_backend, x, scale, bias, num_groups=3, mask=mask.astype(kind).tolist())
    assert_result(wide_backend, result, oracle.group_norm(x, scale, bias, num_groups=3, mask=mask))


def test_numpy_masks_work_with_every_library(backend, rng):
    """A mask in host memory is accepted with any library's input."""
    if backend.name == "jax:jit":
        pytest.skip("a host mask is a constant under jit, which the jax row covers")
    x = draw(rng)[0]
    mask = random_mask(rng, (3, 4, 1, 1))
    y = groupnorm.group_norm(place(backend, poison(x, mask)), num_groups=2, mask=mask)
    reference = oracle.group_norm(poison(x, mask), num_groups=2, mask=mask)
    assert_close(backend.to_numpy(y), reference, tolerance=CONTRACT)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("reduction_axes", [(-1,), (0, -1), (1, -1), (0, 1, 2, 3)])
def test_masks_with_reduction_axes(backend, reduction_axes, fast, rng):
    x, _, scale, bias = draw(rng)
    mask = random_mask(rng, (3, 4, 1, 6))
    x = poison(x, mask)
    keywords = {"num_groups": 2, "reduction_axes": reduction_axes, "mask": mask}
    result = run(backend, x, scale, bias, use_fast_variance=fast, **keywords)
    assert_result(backend, result, oracle.group_norm(x, scale, bias, **keywords))


@pytest.mark.parametrize("features", [(1, 3), (0, 2), (2, 3)])
def test_masks_with_two_feature_axes(backend, features, rng):
    x = rng.normal(size=(4, 4, 5, 6)).astype(np.float32)
    mask = random_mask(rng, (4, 1, 5, 6))
    x = poison(x, mask)
    keywords = {"num_groups": 2, "feature_axis": features, "mask": mask}
    assert_result(backend, run(backend, x, **keywords), oracle.group_norm(x, **keywords))


@pytest.mark.parametrize("padding", [0.0, 1e6, np.nan, np.inf])
@pytest.mark.parametrize("feature_axis", [-1, 1])
def test_a_padded_batch_equals_its_samples_one_by_one(backend, padding, feature_axis, rng):
    lengths, channels = (7, 12, 1, 9), 8
    batch = np.full((4, 12, channels), padding, dtype=np.float32)
    samples = [rng.normal(3, 2, size=(1, n, channels)).astype(np.float32) for n in lengths]
    for row, sample in zip(batch, samples, strict=True):
        row[: sample.shape[1]] = sample[0]
    mask = (np.arange(12) < np.array(lengths)[:, None])[..., None]
    if feature_axis == 1:
        batch, mask = batch.transpose(0, 2, 1), mask.transpose(0, 2, 1)
    together = run(backend, batch, num_groups=2, feature_axis=feature_axis, mask=mask).values
    for i, sample in enumerate(samples):
        alone = sample if feature_axis == -1 else sample.transpose(0, 2, 1)
        single = run(backend, alone, num_groups=2, feature_axis=feature_axis).values[0]
        valid = together[i, :, : lengths[i]] if feature_axis == 1 else together[i, : lengths[i]]
        assert_close(valid, single.astype(np.float64), tolerance=CONTRACT)


def test_nan_at_a_valid_position_stays_in_its_group(backend, rng):
    """A mask excludes padding; it does not hide invalid data."""
    x = draw(rng)[0]
    x[1, 2, 3, 4] = np.nan
    mask = np.ones((4, 1, 1), dtype=bool)
    for given in (None, mask):
        y = run(backend, x, num_groups=2, mask=given).values
        bad = np.isnan(y)
        assert bad[1, ..., 3:].all()
        assert bad.sum() == bad[1, ..., 3:].size


def test_nan_in_the_padding_does_not_spread(backend, rng):
    """flax, brainstate: NaN in padding makes every dx NaN."""
    x, dy, scale, bias = draw(rng, (2, 5, 6))
    mask = np.array([[True] * 5, [True, True, False, False, False]])[..., None]
    x[1, 2:] = np.nan
    keywords = {"num_groups": 3, "mask": mask}
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    got = differentiate(backend, x, dy, scale, bias, **keywords)
    assert_gradients(got, want, rtol=GRADIENT)
    alone = oracle.group_norm(x[1:, :2], scale, bias, num_groups=3)
    np.testing.assert_allclose(got.y[1:, :2], alone, rtol=1e-5, atol=1e-5)


def test_the_mask_is_not_modified(rng):
    x, mask = draw(rng)[0], random_mask(rng, (3, 4, 1, 1)).astype(np.float32)
    kept_x, kept_mask = x.copy(), mask.copy()
    y, pullback = groupnorm.group_norm_vjp(x, num_groups=2, mask=mask)
    pullback(y)
    np.testing.assert_array_equal(x, kept_x)
    np.testing.assert_array_equal(mask, kept_mask)
