"""Feature axes, reduction axes and the batch axis, compared with the oracle."""

import itertools
import math

import numpy as np
import pytest

import groupnorm
from groupnorm.testing import oracle
from tests.rows import (
    CONTRACT,
    assert_close,
    assert_gradients,
    assert_result,
    check_array,
    differentiate,
    run,
)

# Every axis can be the feature axis, with groups of three channels, and no two lengths are equal.
SHAPES = {3: (6, 9, 12), 4: (3, 6, 9, 12)}
# With three nearly equal values any float32 gradient loses digits; a wrong axis is off by 1.
AXES_GRADIENT = 2e-5


def subsets(rest):
    return itertools.chain.from_iterable(
        itertools.combinations(rest, n) for n in range(len(rest) + 1)
    )


def axis_cases():
    """Yield every subset of reduction axes, for every feature axis and every pair of them."""
    for ndim, shape in SHAPES.items():
        for count in (1, 2):
            for features in itertools.combinations(range(ndim), count):
                for others in subsets([a for a in range(ndim) if a not in features]):
                    yield shape, features, tuple(sorted((*features, *others)))


AXIS_CASES = [
    pytest.param(*case, id=f"{len(case[0])}d-features{case[1]}-over{case[2]}".replace(" ", ""))
    for case in axis_cases()
]


def parameters(rng, shape, features):
    sizes = [shape[a] for a in features]
    scale = rng.uniform(0.5, 1.5, size=sizes).astype(np.float32)
    return scale, rng.normal(size=sizes).astype(np.float32)


@pytest.mark.parametrize(("shape", "features", "reduced"), AXIS_CASES)
def test_every_subset_of_reduction_axes(backend, shape, features, reduced, rng):
    """nnx, brainstate: silently wrong by up to 388, or raises."""
    x = rng.normal(size=shape).astype(np.float32)
    scale, bias = parameters(rng, shape, features)
    groups = math.prod(shape[a] for a in features) // 3
    keywords = {"num_groups": groups, "feature_axis": features, "reduction_axes": reduced}
    result = run(backend, x, scale, bias, **keywords)
    assert_result(backend, result, oracle.group_norm(x, scale, bias, **keywords))


@pytest.mark.parametrize(("shape", "features", "reduced"), AXIS_CASES)
def test_gradients_over_every_subset_of_reduction_axes(
    quick_backend, shape, features, reduced, rng
):
    check_gradients(quick_backend, "vjp", shape, features, reduced, rng)


@pytest.mark.parametrize(("shape", "features", "reduced"), AXIS_CASES[::7])
@pytest.mark.parametrize("how", ["vjp", "autodiff"])
def test_gradients_of_differentiating_libraries(
    autodiff_backend, how, shape, features, reduced, rng
):
    check_gradients(autodiff_backend, how, shape, features, reduced, rng)


def check_gradients(backend, how, shape, features, reduced, rng):
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    scale, bias = parameters(rng, shape, features)
    keywords = {
        "group_size": 3,
        "num_groups": None,
        "feature_axis": features,
        "reduction_axes": reduced,
        "epsilon": 1e-2,
    }
    got = differentiate(backend, x, dy, scale, bias, how=how, **keywords)
    assert_close(got.y, oracle.group_norm(x, scale, bias, **keywords), tolerance=CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    assert_gradients(got, want, rtol=AXES_GRADIENT)


@pytest.mark.parametrize(
    ("ndim", "features"),
    [
        (ndim, features)
        for ndim in (1, 2, 3, 4)
        for count in (1, 2)
        for features in itertools.combinations(range(ndim), count)
    ]
    + [(3, 0), (3, -3)],
)
def test_default_reduction_is_everything_but_the_batch(backend, ndim, features, rng):
    """The batch axis is the leading axis, unless that is a feature axis or the only axis.

    brainstate, flax: only the last axis can be the feature axis. keras, haiku: silently wrong for
    axis 0 and for negative axes.
    """
    x = rng.normal(size=(6, 4, 8, 2)[:ndim]).astype(np.float32)
    positive = [axis % ndim for axis in np.atleast_1d(features)]
    scale, bias = parameters(rng, x.shape, positive)
    axes = range(0 if 0 in positive else 1, ndim)
    result = run(backend, x, scale, bias, num_groups=2, feature_axis=features)
    keywords = {"num_groups": 2, "feature_axis": positive, "reduction_axes": axes}
    assert_result(backend, result, oracle.group_norm(x, scale, bias, **keywords))


UNBATCHED = {"one axis": (12,), "channels first": (12, 20), "pixels": (12, 4, 5)}


@pytest.mark.parametrize("case", UNBATCHED)
def test_gradients_without_a_batch(backend, case, rng):
    shape = UNBATCHED[case]
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    scale, bias = parameters(rng, shape, (0,))
    keywords = {"num_groups": 3, "feature_axis": 0}
    got = differentiate(backend, x, dy, scale, bias, **keywords)
    assert_close(got.y, oracle.group_norm(x, scale, bias, **keywords), tolerance=CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    assert_gradients(got, want, rtol=AXES_GRADIENT)


@pytest.mark.parametrize("order", [(1, 3), (3, 1), (-1, 1), (1, -1), [-1, -3]])
def test_order_and_sign_of_feature_axes_do_not_matter(wide_backend, order, rng):
    """Channels are numbered over increasing axes, in whatever order the axes are passed."""
    x = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    scale, bias = parameters(rng, x.shape, (1, 3))
    result = run(wide_backend, x, scale, bias, num_groups=6, feature_axis=order)
    assert_result(
        wide_backend, result, oracle.group_norm(x, scale, bias, num_groups=6, feature_axis=(1, 3))
    )


@pytest.mark.parametrize("axes", [(-1, 1), (1, 3), (3, -3), [-1, 1], (np.int64(1), np.int8(-1))])
def test_reduction_axes_in_any_order_and_sign(backend, axes, rng):
    x = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    result = run(backend, x, num_groups=3, reduction_axes=axes)
    assert_result(backend, result, oracle.group_norm(x, num_groups=3, reduction_axes=(1, 3)))


def test_a_single_reduction_axis_may_be_an_int(backend, rng):
    x = rng.normal(size=(3, 4, 12)).astype(np.float32)
    result = run(backend, x, num_groups=3, reduction_axes=-1)
    assert_result(backend, result, oracle.group_norm(x, num_groups=3, reduction_axes=(2,)))


@pytest.mark.parametrize(
    "shape", [(12,), (3, 12), (2, 3, 12), (2, 1, 3, 2, 12), (1, 2, 3, 1, 2, 12)]
)
def test_any_number_of_leading_axes(wide_backend, shape, rng):
    """nnx: one axis raises."""
    x = rng.normal(size=shape).astype(np.float32)
    scale, bias = parameters(rng, shape, (len(shape) - 1,))
    result = run(wide_backend, x, scale, bias, num_groups=3)
    assert_result(wide_backend, result, oracle.group_norm(x, scale, bias, num_groups=3))


@pytest.mark.parametrize("num_groups", [1, 2, 6, 12])
def test_every_number_of_groups(backend, num_groups, rng):
    x = rng.normal(size=(2, 20, 12)).astype(np.float32)
    reference = oracle.group_norm(x, num_groups=num_groups)
    assert_result(backend, run(backend, x, num_groups=num_groups), reference)
    by_size = run(backend, x, num_groups=None, group_size=12 // num_groups)
    assert_result(backend, by_size, reference)


def test_groups_are_adjacent_channels(backend):
    """MLX: interleaved (channel modulo groups) by default."""
    x = np.array([[0, 2, 10, 20, 100, 300]], np.float32)
    result = run(backend, x, num_groups=3, epsilon=0.0)
    np.testing.assert_allclose(result.values, [[-1, 1, -1, 1, -1, 1]], rtol=1e-6)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpy_integers_are_accepted_as_integers(kind, rng):
    """nnx: np.int64 groups rejected."""
    x = rng.normal(size=(2, 5, 6))
    want = oracle.group_norm(x, num_groups=3)
    for keywords in (
        {"num_groups": kind(3)},
        {"num_groups": kind(3), "feature_axis": np.int32(-1)},
        {"num_groups": None, "group_size": kind(2), "feature_axis": kind(2)},
    ):
        np.testing.assert_allclose(groupnorm.group_norm(x, **keywords), want, rtol=1e-12)
    layer = groupnorm.GroupNorm(kind(6), num_groups=kind(3))
    np.testing.assert_allclose(layer(x), want, rtol=1e-12)
    assert type(layer.num_groups) is int
    assert layer.in_size == (6,)


class TestLayer:
    """`in_size` and `feature_axis` of the layer, which do not include the batch."""

    CASES = {
        "channels last": ((5, 6, 12), -1, (3, 5, 6, 12), (3,)),
        "channels first": ((12, 5, 6), 0, (3, 12, 5, 6), (1,)),
        "channels first, from the end": ((12, 5, 6), -3, (3, 12, 5, 6), (1,)),
        "int": (12, -1, (3, 5, 12), (2,)),
        "fewer axes than x": ((12,), -1, (3, 5, 6, 12), (3,)),
        "more leading axes": ((12, 5), 0, (2, 3, 12, 5), (2,)),
        "unbatched": ((5, 12), -1, (5, 12), (1,)),
        "unbatched channels first": ((12, 5), 0, (12, 5), (0,)),
        "two feature axes": ((4, 5, 6), (0, 2), (3, 4, 5, 6), (1, 3)),
        "ellipsis after the channels": ((12, ...), 0, (3, 12, 5, 6), (1,)),
        "ellipsis standing for nothing": ((12, ...), 0, (3, 12), (1,)),
        "ellipsis before the channels": ((..., 12), -1, (3, 5, 6, 12), (3,)),
        "ellipsis between": ((4, ..., 3), (0, -1), (2, 4, 5, 6, 3), (1, 4)),
        "other sizes are not enforced": ((99, 98, 12), -1, (3, 5, 6, 12), (3,)),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_numpy_layer_on_every_library(self, backend, case, rng):
        """The NumPy layer is the portable one: the array decides which library computes."""
        in_size, feature_axis, shape, axes = self.CASES[case]
        quarter = groupnorm.initializers.constant(0.25)
        layer = groupnorm.GroupNorm(in_size, feature_axis, num_groups=3, bias_init=quarter)
        if backend.name == "jax:jit":
            pytest.skip("a plain object cannot be traced as an argument; see the JAX layer's tests")
        x = rng.normal(size=shape).astype(np.float32)
        given = backend.asarray(x)
        y = layer(given)
        check_array(backend, y, shape=shape, dtype="float32")
        bias = np.full([shape[a] for a in axes], 0.25)
        reference = oracle.group_norm(x, None, bias, num_groups=3, feature_axis=axes)
        assert_close(backend.to_numpy(y), reference, tolerance=CONTRACT)

    def test_one_group_is_layer_normalization_over_all_but_the_batch(self, rng):
        x = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
        y = groupnorm.GroupNorm(x.shape, num_groups=1)(x)
        wide = x.astype(np.float64)
        mean, var = (f(wide, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
        assert_close(y, (wide - mean) / np.sqrt(var + 1e-6), tolerance=CONTRACT)

    def test_reduction_axes_are_axes_of_x(self, rng):
        x = rng.normal(size=(3, 4, 5, 12)).astype(np.float32)
        y = groupnorm.GroupNorm((5, 12), num_groups=3, reduction_axes=(1, -1))(x)
        assert_close(
            y, oracle.group_norm(x, num_groups=3, reduction_axes=(1, 3)), tolerance=CONTRACT
        )
