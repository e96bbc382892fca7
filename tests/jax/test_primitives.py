"""JAX on a CPU by the primitives, lowered to kernels or portably: values, derivatives, memory."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from groupnorm import group_norm, group_norm_vjp
from groupnorm.adapter import Unsupported
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import oracle
from tests.rows import (
    CONTRACT,
    CONTRACT_64,
    GRADIENT,
    GRADIENT_FAR,
    assert_close,
    assert_gradient,
)

pytestmark = pytest.mark.needs("jax")

ACTIVATIONS = (None, "relu", "silu", "gelu")
# Shape, feature axis, groups: lengths with many divisors and none, one channel a group, one group.
SHAPES = {
    "last": ((2, 9, 8, 12), -1, 4),
    "first": ((2, 12, 9, 8), 1, 4),
    "last, prime": ((3, 61, 12), -1, 4),
    "first, prime": ((3, 12, 61), 1, 4),
    "last, one sample": ((4100, 12), None, 3),
    "first, one sample": ((1, 12, 4100), 1, 3),
    "size 1": ((2, 50, 8), -1, 8),
    "one group": ((2, 8, 50), 1, 1),
}


@pytest.fixture(params=["kernels", "portable"])
def lowered_to(request):
    """What the primitives are lowered to: kernels, or the portable code where there are none."""
    return request.param


# The keyword that makes a call use the primitives, or fail.
IMPLEMENTATION = {"implementation": "fused"}


def must_bind(bind, adapter):
    """Let calls fail that ask for no implementation and do not use the primitives.

    An adapter for these calls alone tells their lowerings apart, in JAX's caches, from kernels.
    """

    def checked(_, x, scale, bias, mask, options):
        found = bind(adapter, x, scale, bias, mask, options)
        if isinstance(found, Unsupported) and options.implementation is None:
            raise AssertionError(f"not supported: {found.reason}")
        return found

    return checked


@pytest.fixture(scope="session")
def another_adapter():
    """An adapter of JAX that no other test uses."""
    module = importlib.import_module("groupnorm.backends.jax.adapter")
    return module.JaxAdapter(importlib.import_module("jax.numpy"))


@pytest.fixture
def jax(lowered_to, monkeypatch, another_adapter):
    """As in a process with one device; conftest asks for four, and everything lies on the first."""
    module = importlib.import_module("jax")
    if module.default_backend() != "cpu":
        pytest.skip("this form is for the CPU backend")
    monkeypatch.setattr(module, "device_count", lambda: 1)
    if lowered_to == "kernels":
        pytest.importorskip(
            "groupnorm.backends.kernels.cpu._core", reason="the core is not compiled here"
        )
        return module
    availability = importlib.import_module("groupnorm.backends.kernels.cpu.availability")
    monkeypatch.setattr(availability, "why_unavailable", lambda: Unsupported("not now"))
    # There is no implementation of this name.
    monkeypatch.setitem(IMPLEMENTATION, "implementation", None)
    kernels = importlib.import_module("groupnorm.backends.jax.kernels")
    monkeypatch.setattr(kernels, "_bind", must_bind(kernels._bind, another_adapter))
    return module


def draw(name, rng, offset=0.0, masked=False):
    """Return x, dy, scale, bias and the keywords of a call."""
    shape, axis, groups = SHAPES[name]
    keywords = {"num_groups": groups, "feature_axis": -1 if axis is None else axis}
    if axis is None:
        keywords["reduction_axes"] = (0, 1)
    axis = keywords["feature_axis"]
    x = (rng.normal(size=shape) + offset).astype(np.float32)
    if masked:
        mask_shape = list(shape)
        mask_shape[axis] = 1
        keywords["mask"] = rng.random(mask_shape) < 0.7
    dy = rng.normal(size=shape).astype(np.float32)
    scale = rng.uniform(0.5, 1.5, shape[axis]).astype(np.float32)
    return x, dy, scale, rng.normal(size=shape[axis]).astype(np.float32), keywords


def form(*implementation, **keywords):
    """Return the call as a function of x, scale and bias."""
    (name,) = implementation or IMPLEMENTATION.values()

    def call(x, scale, bias):
        return group_norm(x, scale, bias, implementation=name, **keywords)

    return call


def gradients_of(jax, call, x, dy, scale, bias):
    return differentiated(jax, call)(*map(jax.numpy.asarray, (x, scale, bias, dy)))


def differentiated(jax, call):
    """Return a function of x, scale, bias and dy for the values and gradients of a call."""

    def both(x, scale, bias, dy):
        y, pullback = jax.vjp(call, x, scale, bias)
        return y, pullback(dy)

    # Without jit, the portable code would be compiled in parts, which takes seconds.
    return jax.jit(both) if IMPLEMENTATION["implementation"] is None else both


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(jax, name, masked, rng):
    keywords = draw(name, rng, masked=masked)[-1]
    call = form(**keywords)
    functions = [differentiated(jax, f) for f in (call, jax.jit(call))]
    for offset, bound in ((0.0, GRADIENT), (1e3, GRADIENT_FAR)):
        x, dy, scale, bias, _ = draw(name, rng, offset)
        want = oracle.group_norm(x, scale, bias, **keywords)
        want_gradients = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
        for function in functions:
            y, gradients = function(*map(jax.numpy.asarray, (x, scale, bias, dy)))
            # y = xhat * scale + bias, with scale up to 1.5: two roundings beyond the contract.
            assert_close(y, want, tolerance=2 * CONTRACT)
            for got, reference in zip(gradients, want_gradients, strict=True):
                assert_gradient(np.asarray(got), reference, rtol=bound)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("kind", ["offset", "spike", "ramp", "sorted", "lognormal", "channels"])
def test_the_accuracy_contract(jax, kind, layout, fast, rng):
    x = rng.normal(size=(2, 32, 32, 16))
    if kind == "offset":
        x += 1e5
    elif kind == "spike":
        x[:, 0, 0] = 1e3
        x[0, 7, 7, 3] = -1e5
    elif kind == "ramp":
        x += np.linspace(0, 1e4, 1024).reshape(1, 32, 32, 1)
    elif kind == "sorted":
        x = np.sort(x.reshape(2, -1), axis=1).reshape(x.shape)
    elif kind == "lognormal":
        x = np.exp(4 * x)
    else:
        x += rng.choice([-1e5, 1e5], size=16)
    axis = -1 if layout == "last" else 1
    x = np.moveaxis(x, -1, axis).astype(np.float32)
    keywords = {"num_groups": 4, "feature_axis": axis}
    y = group_norm(jax.numpy.asarray(x), **IMPLEMENTATION, use_fast_variance=fast, **keywords)
    assert_close(y, oracle.group_norm(x, **keywords), tolerance=CONTRACT)


@pytest.mark.parametrize("name", SHAPES)
def test_constants_give_exactly_the_bias(jax, name, rng):
    x, _, scale, bias, keywords = draw(name, rng)
    axis = keywords["feature_axis"]
    for epsilon in (0.0, 1e-6):
        call = jax.jit(form(epsilon=epsilon, **keywords))
        for value in (0.0, 1e-3, 3.7, -1e5, 1e20):
            y = np.moveaxis(np.asarray(call(np.full_like(x, value), scale, bias)), axis, -1)
            np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("size", [1e-20, 1e20])
@pytest.mark.parametrize("epsilon", [0.0, 1e-30, 1e-6])
def test_squares_beyond_the_range(jax, size, epsilon, masked, rng):
    x, dy, scale, bias, keywords = draw("last", rng, masked=masked)
    x[0] *= np.float32(size)  # and the other sample as it was
    keywords["epsilon"] = epsilon
    y, gradients = gradients_of(jax, form(**keywords), x, dy, scale, bias)
    assert_close(y, oracle.group_norm(x, scale, bias, **keywords), tolerance=2 * CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    for sample in (0, 1):  # each to its own size
        assert_gradient(np.asarray(gradients[0])[sample], want.x[sample], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_group_alone(jax, bad, rng):
    x, _, scale, bias, keywords = draw("last", rng)
    x[0].flat[0] = bad
    y = np.asarray(form(**keywords)(jax.numpy.asarray(x), scale, bias))
    groups = np.moveaxis(y, -1, 1).reshape(2, 4, -1)
    assert np.isnan(groups[0, 0]).all()
    assert np.isfinite(groups.reshape(8, -1)[1:]).all()


@pytest.mark.parametrize("padding", [np.nan, np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize("name", ["last", "first", "last, one sample"])
def test_what_is_masked_out_does_not_matter(jax, name, padding, rng):
    x, dy, scale, bias, keywords = draw(name, rng, masked=True)
    valid = np.broadcast_to(keywords["mask"], x.shape)
    padded = np.where(valid, x, np.float32(padding))
    dy[~valid] = 0
    call = form(**keywords)
    y, gradients = gradients_of(jax, call, x, dy, scale, bias)
    padded_y, padded_gradients = gradients_of(jax, call, padded, dy, scale, bias)
    # Not to the bit: another branch computes where something is not finite.
    np.testing.assert_allclose(np.asarray(padded_y)[valid], np.asarray(y)[valid], atol=1e-5)
    for got, want in zip(padded_gradients, gradients, strict=True):
        assert_gradient(np.asarray(got), np.asarray(want, np.float64), rtol=GRADIENT)


@pytest.mark.parametrize("lowered_to", ["portable"])  # in float64, which kernels do not compute
@pytest.mark.parametrize(
    ("layout", "activation", "masked"),
    [
        ("last", None, False),
        ("first", None, True),
        ("first", "silu", False),
        ("last", "gelu", True),
    ],
)
def test_derivatives_agree_with_the_portable_code(jax, layout, activation, masked, rng):
    """In float64, where they must agree to all but rounding: jvp, vjp, and both of the gradient."""
    with jax.enable_x64(True):
        x, dy, scale, bias, keywords = draw(layout, rng, masked=masked)
        given = [jax.numpy.asarray(a, "float64") for a in (x, scale, bias)]
        tangents = tuple(jax.numpy.asarray(rng.normal(size=a.shape)) for a in given)
        found = []
        for implementation in (IMPLEMENTATION["implementation"], "portable"):
            call = form(implementation, activation=activation, epsilon=1e-3, **keywords)

            def gradient(*arguments, call=call):
                return jax.grad(lambda *a: (call(*a) * dy).sum(), (0, 1, 2))(*arguments)

            def twice(*arguments, gradient=gradient):
                products = zip(gradient(*arguments), tangents, strict=True)
                return sum((g * t).sum() for g, t in products)

            derivatives = (
                lambda *given, call=call: jax.jvp(call, given, tangents),
                lambda *given, gradient=gradient: jax.jvp(gradient, given, tangents),
                jax.grad(twice, (0, 1, 2)),
            )
            found.append([jax.jit(derivative)(*given) for derivative in derivatives])
        for got, want in zip(*map(jax.tree.leaves, found), strict=True):
            largest = max(1.0, float(abs(want).max()))
            assert float(abs(got - want).max()) <= 20 * CONTRACT_64 * largest


@pytest.mark.parametrize("lowered_to", ["portable"])  # in float64, which kernels do not compute
def test_jvp_by_differences(jax, rng):
    with jax.enable_x64(True):
        x, _, scale, bias, keywords = draw("last", rng)
        given = [a.astype(np.float64) for a in (x, scale, bias)]
        tangents = [rng.normal(size=a.shape) for a in given]
        h = 1e-6
        ahead, behind = (
            oracle.group_norm(
                *(a + sign * h * t for a, t in zip(given, tangents, strict=True)), **keywords
            )
            for sign in (1, -1)
        )
        call = form(**keywords)
        _, got = jax.jvp(call, *(tuple(map(jax.numpy.asarray, a)) for a in (given, tangents)))
        np.testing.assert_allclose(np.asarray(got), (ahead - behind) / (2 * h), atol=1e-7)


@pytest.mark.parametrize("lowered_to", ["portable"])  # in float64, which kernels do not compute
def test_hessian(jax, rng):
    with jax.enable_x64(True):
        x = jax.numpy.asarray(rng.normal(size=(1, 17, 2)))
        weights = jax.numpy.asarray(rng.normal(size=x.shape))
        fused, portable = (
            jax.jit(
                jax.hessian(
                    lambda x, name=name: (
                        group_norm(x, num_groups=1, epsilon=1e-3, implementation=name) * weights
                    ).sum()
                )
            )(x)
            for name in (IMPLEMENTATION["implementation"], "portable")
        )
        np.testing.assert_allclose(fused, portable, atol=1e-11)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("layout", ["last", "first"])
def test_vmap(jax, layout, masked, rng):
    x, dy, scale, bias, keywords = draw(layout, rng, masked=masked)
    mask = keywords.pop("mask", None)
    batch = np.stack([x, 1e20 * x, x + 100])  # one of them beyond the range of squares
    masks = None if mask is None else jax.numpy.asarray(np.stack([mask, ~mask, mask]))

    def call(x, mask):
        y, pullback = jax.vjp(form(mask=mask, **keywords), x, scale, bias)
        return y, pullback(jax.numpy.asarray(dy))

    got = jax.vmap(call, in_axes=(0, None if masks is None else 0))(batch, masks)
    for i, element in enumerate(batch):
        want = call(jax.numpy.asarray(element), None if masks is None else masks[i])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_gradient(np.asarray(a[i]), np.asarray(b, np.float64), rtol=5 * GRADIENT)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["last", "first"])
def test_small_dtypes(jax, layout, name, rng):
    x, dy, scale, bias, keywords = draw(layout, rng, offset=10.0)
    keywords["dtype"] = "input"
    x, dy = (jax.numpy.asarray(a, name) for a in (x, dy))
    y, gradients = gradients_of(jax, form(**keywords), x, dy, scale, bias)
    assert y.dtype == x.dtype
    assert [g.dtype for g in gradients] == [x.dtype, np.float32, np.float32]
    wide_x, wide_dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    keywords.pop("dtype")
    one_unit = float(jax.numpy.finfo(name).eps)
    want = oracle.group_norm(wide_x, scale, bias, **keywords)
    assert_close(np.asarray(y), want, tolerance=1.01 * one_unit)
    want = oracle.group_norm_gradients(wide_x, wide_dy, scale, bias, **keywords)
    for got, reference in zip(gradients, want, strict=True):
        rtol = one_unit if got.dtype == x.dtype else GRADIENT
        assert_gradient(np.asarray(got), reference, rtol=rtol)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["last", "first"])
def test_nothing_of_full_size_but_x_is_kept(jax, layout, activation, masked, rng):
    x, _, scale, bias, keywords = draw(layout, rng, masked=masked)
    x, scale, bias = map(jax.numpy.asarray, (x, scale, bias))
    _, pullback = jax.vjp(form(activation=activation, **keywords), x, scale, bias)
    kept = [a for a in jax.tree.leaves(pullback) if isinstance(a, jax.Array)]
    large = [a for a in kept if a.size >= x.size and a.dtype != bool]
    assert len(large) == 1
    np.testing.assert_array_equal(large[0].ravel(), x.ravel())
    # The check can fail: the portable code keeps more.
    call = form("portable", activation="silu", **keywords)
    _, pullback = jax.vjp(call, x, scale, bias)
    assert sum(a.size >= x.size for a in jax.tree.leaves(pullback) if hasattr(a, "size")) > 1


def test_no_choice_takes_this_form_and_portable_does_not(jax, rng):
    x, _, scale, bias, keywords = draw("last", rng)
    programs = {
        name: str(jax.make_jaxpr(form(name, **keywords))(x, scale, bias))
        for name in (None, IMPLEMENTATION["implementation"], "portable")
    }
    assert programs[None] == programs[IMPLEMENTATION["implementation"]] != programs["portable"]


def test_group_norm_vjp(jax, rng):
    x, dy, scale, bias, keywords = draw("first", rng)
    given = [jax.numpy.asarray(a) for a in (x, scale, bias)]
    y, pullback = group_norm_vjp(*given, **IMPLEMENTATION, **keywords)
    np.testing.assert_array_equal(y, form(**keywords)(*given))
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    for got, reference in zip(pullback(jax.numpy.asarray(dy)), want, strict=True):
        assert_gradient(np.asarray(got), reference, rtol=GRADIENT)
    assert group_norm_vjp(given[0], **IMPLEMENTATION, **keywords)[1](given[0]).scale is None
    with pytest.raises(ArgumentValueError, match="dy has shape"):
        pullback(given[0][:1])
    with pytest.raises(ArgumentTypeError, match="dy"):
        pullback(dy.tolist())


@pytest.mark.parametrize(
    ("shape", "dtype", "keywords", "reason"),
    [
        ((2, 20, 4), "complex64", {}, "real floating dtypes"),
        ((2, 20, 4), "int32", {}, "real floating dtypes"),
        ((0, 20, 4), "float32", {}, "x has no elements"),
        ((2, 20, 4), "float32", {"mask": np.ones(4, bool)}, "varies along the feature axes"),
        ((2, 20, 4, 5), "float32", {"feature_axis": 2}, "order is KPCP"),
    ],
)
def test_what_is_not_served_says_why(jax, lowered_to, shape, dtype, keywords, reason):
    x = jax.numpy.ones(shape, dtype)
    keywords = {"num_groups": 2, **keywords}
    message = f"implementation='fused' cannot compute this call: .*{reason}.*implementation=None"
    with pytest.raises(ArgumentValueError, match=message):
        group_norm(x, implementation="fused", **keywords)
    if lowered_to == "kernels":  # elsewhere this file lets such calls fail
        assert group_norm(x, **keywords).shape == x.shape


def test_without_kernels_fused_says_why(jax, lowered_to):
    x = jax.numpy.ones((2, 20, 4))
    if lowered_to == "kernels":
        assert group_norm(x, num_groups=2, implementation="fused").shape == x.shape
        return
    with pytest.raises(ArgumentValueError, match="cannot compute this call: not now"):
        group_norm(x, num_groups=2, implementation="fused")


def test_replicas_and_several_devices_are_not_served(jax, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATION, "implementation", "fused")
    x = jax.numpy.ones((2, 20, 4))
    call = form(num_groups=2, axis_name="rows")
    with pytest.raises(ArgumentValueError, match="statistics of replicas are pooled"):
        jax.vmap(lambda x: call(x, None, None), axis_name="rows")(x[:, None])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(ArgumentValueError, match="JAX has 2 devices"):
        form(num_groups=2)(x, None, None)


def test_wrong_arguments_are_named_as_ever(jax):
    x = jax.numpy.ones((2, 20, 4))
    for keywords, word in (
        ({"scale": jax.numpy.ones(5)}, "scale has shape"),
        ({"mask": np.ones((2, 7, 1), bool)}, "mask has shape"),
        ({"num_groups": 3}, "num_groups=3 does not divide"),
    ):
        with pytest.raises(ArgumentValueError, match=word):
            group_norm(x, **IMPLEMENTATION, **{"num_groups": 2, **keywords})
