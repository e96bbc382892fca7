"""Properties that hold for any shape, axes, groups and mask, drawn by hypothesis.

Hypothesis draws the arguments of the call; the values come from a random seed that it draws too.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from groupnorm import group_norm, group_norm_vjp
from groupnorm.errors import ArgumentValueError
from groupnorm.testing import oracle
from tests.rows import (
    CONTRACT,
    GRADIENT,
    GRADIENT_FAR,
    assert_close,
    assert_result,
    differentiate,
    run,
)

PADDING = (np.nan, np.inf, -np.inf, 1e4)
SIZES = st.integers(0, 6)
SEEDS = st.integers(0, 2**32 - 1)
FAST = st.booleans()

# The rows are fixtures without state, so examples are independent.
properties = settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: the arrays, and the keywords, which the oracle accepts too."""

    x: np.ndarray
    dy: np.ndarray
    scale: np.ndarray | None
    bias: np.ndarray | None
    mask: np.ndarray | None
    offset: float
    features: tuple[int, ...]
    keywords: dict

    @property
    def valid(self) -> np.ndarray:
        mask = True if self.mask is None else self.mask != 0
        return np.broadcast_to(mask, self.x.shape)

    def reference(self) -> np.ndarray:
        return oracle.group_norm(self.x, self.scale, self.bias, mask=self.mask, **self.keywords)


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def written(draw, axes, ndim: int):
    """Return axes as a user may write them: in any order, negative or not, a single one as int."""
    signed = [a - ndim if draw(st.booleans()) else a for a in draw(st.permutations(axes))]
    return signed[0] if len(signed) == 1 and draw(st.booleans()) else tuple(signed)


@st.composite
def shapes_and_features(draw):
    """Return a shape of 1 to 5 axes, and its one or two feature axes."""
    ndim = draw(st.integers(1, 5))
    features = draw(
        st.lists(st.integers(0, ndim - 1), min_size=1, max_size=min(2, ndim), unique=True)
    )
    shape = [draw(SIZES) for _ in range(ndim)]
    for axis in features:
        shape[axis] = max(1, shape[axis])
    return tuple(shape), tuple(sorted(features))


def draw_values(rng, kind: str, shape) -> np.ndarray:
    match kind:
        case "normal":
            return rng.normal(size=shape)
        case "ties":  # many groups are constant
            return rng.integers(-1, 2, size=shape) * 1.0
        case "heavy tails":
            return np.clip(rng.standard_t(1.5, size=shape), -1e3, 1e3)
    raise AssertionError(kind)


@st.composite
def masks(draw, rng, shape):
    """Return None, or a mask of any dtype and any shape that broadcasts to `shape`."""
    if draw(st.booleans()):
        return None
    mask_shape = [n if draw(st.booleans()) else 1 for n in shape]
    mask_shape = mask_shape[draw(st.integers(0, len(shape))) :]
    share = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    dtype = draw(st.sampled_from(["bool", "uint8", "int64", "float32"]))
    return np.asarray(rng.random(mask_shape) < share).astype(dtype)


@st.composite
def problems(draw, offsets=(0.0, 1.0, 1e3, 1e5), padding=PADDING):
    shape, features = draw(shapes_and_features())
    ndim, rng = len(shape), np.random.default_rng(draw(SEEDS))
    channels = math.prod(shape[a] for a in features)
    groups = draw(st.sampled_from(divisors(channels)))
    keywords = {
        "feature_axis": written(draw, features, ndim),
        "epsilon": draw(st.sampled_from([1e-6, 1e-2])),
        "num_groups": groups,
    }
    if draw(st.booleans()):
        keywords |= {"num_groups": None, "group_size": channels // groups}
    if draw(st.booleans()):
        rest = [a for a in range(ndim) if a not in features]
        others = draw(st.lists(st.sampled_from(rest), unique=True)) if rest else []
        keywords["reduction_axes"] = written(draw, (*features, *others), ndim)
    offset = draw(st.sampled_from(offsets))
    kind = draw(st.sampled_from(["normal", "ties", "heavy tails"]))
    x = (offset + draw_values(rng, kind, shape)).astype(np.float32)
    mask = draw(masks(rng, shape))
    problem = Problem(
        x,
        rng.normal(size=shape).astype(np.float32),
        *(
            value.astype(np.float32) if draw(st.booleans()) else None
            for value in (
                rng.uniform(0.5, 1.5, size=[shape[a] for a in features]),
                rng.normal(size=[shape[a] for a in features]),
            )
        ),
        mask,
        offset,
        features,
        keywords,
    )
    out = np.flatnonzero(~problem.valid)
    if padding and draw(st.booleans()):
        x.flat[out] = rng.choice(padding, size=out.size)
    return problem


def gradient_bounds(problem: Problem) -> oracle.Gradients:
    """Return the magnitude of the terms of each gradient, to which its rounding is relative.

    In groups of few elements the terms cancel; with a single valid element they are larger than
    the gradient by 1 / sqrt(epsilon).
    """
    keywords = {"num_groups": None, "group_size": None, "reduction_axes": None, **problem.keywords}
    epsilon = keywords.pop("epsilon")
    x, valid, features, wheres = oracle.prepare(problem.x, problem.mask, **keywords)
    scales = oracle.per_element(problem.scale, x.shape, features, 1.0)
    h = np.abs(scales * problem.dy)
    dx, dscale = np.zeros(x.shape), np.zeros(x.shape)
    for where in wheres:
        group = oracle.measure(x, valid, where, epsilon)
        xhat, n = np.abs(group.normalized), max(1, group.count)
        # The rounding error of a deviation is relative to the spread, not to the deviation.
        rough = xhat + xhat[group.valid].max(initial=0)
        p, q = h[where].sum() / n, (h[where] * rough).sum() / n
        dx[where] = group.rstd * (h[where] + p + rough * q).max(initial=0)
        dscale[where] = np.abs(problem.dy[where]) * rough
    dy = np.abs(oracle.widen(problem.dy))
    return oracle.Gradients(
        dx,
        None if problem.scale is None else oracle.sum_by_entry(dscale, features, problem.scale),
        None if problem.bias is None else oracle.sum_by_entry(dy, features, problem.bias),
    )


@properties
@given(problem=problems(), fast=FAST)
def test_result_equals_the_oracle(quick_backend, problem, fast):
    result = run(
        quick_backend,
        problem.x,
        problem.scale,
        problem.bias,
        mask=problem.mask,
        use_fast_variance=fast,
        **problem.keywords,
    )
    assert_result(quick_backend, result, problem.reference())


@properties
@given(problem=problems(offsets=(0.0, 1.0, 1e3)), fast=FAST)
def test_gradients_equal_the_oracle(quick_backend, problem, fast):
    arguments = (problem.x, problem.dy, problem.scale, problem.bias)
    keywords = {"mask": problem.mask, **problem.keywords}
    got = differentiate(quick_backend, *arguments, use_fast_variance=fast, **keywords)
    assert_close(got.y, problem.reference(), tolerance=CONTRACT)
    want = oracle.group_norm_gradients(*arguments, **keywords)
    bounds = gradient_bounds(problem)
    rtol = GRADIENT if problem.offset < 1e3 else GRADIENT_FAR
    for name in ("x", "scale", "bias"):
        expected = getattr(want, name)
        if expected is not None:
            error = np.abs(getattr(got, name) - expected)
            assert (error <= rtol * getattr(bounds, name) + 1e-30).all(), (name, error.max())


@st.composite
def padded_batches(draw):
    """Return samples of unequal length, their padded axis, their feature axis, and groups."""
    ndim = draw(st.integers(2, 4))
    feature, ragged = draw(st.permutations(range(1, ndim)))[:2] if ndim > 2 else (1, 0)
    assume(ragged)
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    shape[0] = 1
    shape[feature] = draw(st.integers(1, 6))
    groups = draw(st.sampled_from(divisors(shape[feature])))
    rng = np.random.default_rng(draw(SEEDS))
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    samples = []
    for length in lengths:
        shape[ragged] = length
        samples.append(3 + rng.normal(size=(2, *shape)).astype(np.float32))
    return samples, ragged, feature, groups


@properties
@given(batch=padded_batches(), padding=st.sampled_from(PADDING), fast=FAST)
def test_padded_samples_equal_samples_alone(quick_backend, batch, padding, fast):
    """The valid part of every sample, and its gradient, are those of the sample alone."""
    samples, ragged, feature, groups = batch
    longest = max(x.shape[ragged] for x, _ in samples)

    def pad(a, filling):
        widths = [(0, 0)] * a.ndim
        widths[ragged] = (0, longest - a.shape[ragged])
        return np.pad(a, widths, constant_values=filling)

    x = np.concatenate([pad(x, padding) for x, _ in samples])
    dy = np.concatenate([pad(dy, 0) for _, dy in samples])
    positions = np.arange(longest).reshape(-1, *(1 for _ in x.shape[ragged + 1 :]))
    lengths = np.array([x.shape[ragged] for x, _ in samples])
    mask = positions < lengths.reshape(-1, *(1 for _ in x.shape[1:]))
    keywords = {
        "num_groups": groups,
        "feature_axis": feature,
        "use_fast_variance": fast,
        "epsilon": 1e-2,
    }
    together = differentiate(quick_backend, x, dy, mask=mask, **keywords)
    for i, sample in enumerate(samples):
        alone = differentiate(quick_backend, *sample, **keywords)
        valid = (slice(i, i + 1), *(slice(n) for n in sample[0].shape[1:]))
        assert_close(together.y[valid], alone.y.astype(np.float64), tolerance=CONTRACT)
        # Gradients here are below 10 * rstd * |dy|, with rstd at most 1 / sqrt(epsilon).
        np.testing.assert_allclose(together.x[valid], alone.x, rtol=0, atol=100 * GRADIENT)
    assert (together.x[~np.broadcast_to(mask, x.shape)] == 0).all()


def groups_of(problem: Problem):
    """Return every group's positions, and which of its elements are valid."""
    keywords = {"num_groups": None, "group_size": None, "reduction_axes": None, **problem.keywords}
    del keywords["epsilon"]
    _, valid, _, wheres = oracle.prepare(problem.x, problem.mask, **keywords)
    return [(where, valid[where]) for where in wheres]


def measured(problem: Problem) -> np.ndarray:
    """Return where elements are normalized by their group's data, not by mean 0 and variance 1."""
    out = np.zeros(problem.x.shape, bool)
    for where, valid in groups_of(problem):
        out[where] = valid.any()
    return out


def result_of(backend, problem: Problem, fast: bool) -> np.ndarray:
    return run(
        backend,
        problem.x,
        problem.scale,
        problem.bias,
        mask=problem.mask,
        use_fast_variance=fast,
        **problem.keywords,
    ).values


@properties
@given(problem=problems(), fast=FAST, data=st.data())
def test_permuting_any_other_axis_permutes_the_result(quick_backend, problem, fast, data):
    """The batch axis too: a sample depends neither on the other samples nor on its index."""
    ndim = problem.x.ndim
    others = [a for a in range(ndim) if a not in problem.features]
    assume(others)
    axis = data.draw(st.sampled_from(others))
    order = data.draw(st.permutations(range(problem.x.shape[axis])))
    mask = problem.mask
    if mask is not None:
        mask = mask.reshape((1,) * (ndim - mask.ndim) + mask.shape)
        mask = mask if mask.shape[axis] == 1 else mask.take(order, axis)
    permuted = dataclasses.replace(problem, x=problem.x.take(order, axis), mask=mask)
    y = result_of(quick_backend, problem, fast).take(order, axis)
    assert_close(result_of(quick_backend, permuted, fast), y.astype(np.float64), tolerance=CONTRACT)


@properties
@given(
    problem=problems(offsets=(0.0,), padding=()),
    fast=FAST,
    constant=st.integers(-(2**17), 2**17),
)
def test_adding_a_constant_changes_nothing(quick_backend, problem, fast, constant):
    """Multiples of 1/16 up to 1e3: adding the constant is exact, so only the library rounds."""
    x = (np.clip(np.round(16 * problem.x), -100, 100) / 16).astype(np.float32)
    shifted = x + np.float32(constant)
    np.testing.assert_array_equal(shifted.astype(np.float64), x.astype(np.float64) + constant)
    problem = dataclasses.replace(problem, x=x)
    y = result_of(quick_backend, dataclasses.replace(problem, x=shifted), fast)
    same = measured(problem)
    assert_close(y[same], problem.reference()[same], tolerance=CONTRACT)


@properties
@given(
    problem=problems(padding=(np.nan, np.inf, -np.inf)),
    fast=FAST,
    power=st.integers(-30, 30),
    keep_epsilon=st.booleans(),
)
def test_scaling_by_a_power_of_two(quick_backend, problem, fast, power, keep_epsilon):
    """With epsilon scaled by the square, the result is the same; epsilon 0 needs no scaling."""
    epsilon = problem.keywords["epsilon"] if keep_epsilon else 0
    before = dataclasses.replace(problem, keywords=problem.keywords | {"epsilon": epsilon})
    scaled = epsilon * 4.0**power
    after = dataclasses.replace(
        problem,
        x=np.ldexp(problem.x, power),
        keywords=problem.keywords | {"epsilon": scaled},
    )
    same = measured(problem)
    if not epsilon:
        # Then the divisor of masked-out elements in a constant group is undefined.
        same &= problem.valid
    y = result_of(quick_backend, before, fast)[same].astype(np.float64)
    assert_close(result_of(quick_backend, after, fast)[same], y, tolerance=CONTRACT)


@properties
@given(problem=problems(offsets=(0.0,), padding=()), fast=FAST)
def test_valid_elements_of_a_group_have_mean_0_and_variance_1(quick_backend, problem, fast):
    """The defining property of the layer, checked without the oracle."""
    alone = dataclasses.replace(problem, scale=None, bias=None)
    y = result_of(quick_backend, alone, fast).astype(np.float64)
    for where, valid in groups_of(problem):
        if valid.any():
            out = y[where][valid]
            variance = problem.x[where][valid].astype(np.float64).var()
            expected = variance / (variance + problem.keywords["epsilon"])
            assert abs(out.mean()) <= CONTRACT * max(1, np.abs(out).max())
            assert abs(np.square(out).mean() - expected) <= 4 * CONTRACT


@properties
@given(
    shape_and_features=shapes_and_features(),
    groups=st.integers(-3, 40),
    by_size=st.booleans(),
)
@pytest.mark.parametrize("function", [group_norm, group_norm_vjp])
def test_wrong_numbers_of_groups_raise(
    quick_backend, function, shape_and_features, groups, by_size
):
    shape, features = shape_and_features
    channels = math.prod(shape[a] for a in features)
    assume(groups not in divisors(channels))
    keywords = {"num_groups": groups}
    if by_size:
        keywords = {"num_groups": None, "group_size": groups}
    x = quick_backend.asarray(np.zeros(shape, np.float32))
    with pytest.raises(ArgumentValueError) as caught:
        function(x, feature_axis=features, **keywords)
    assert f"{'group_size' if by_size else 'num_groups'}={groups}" in str(caught.value)
