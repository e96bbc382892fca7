"""Gradients for a random cotangent: their accuracy, and that all ways to compute them agree."""

import importlib

import numpy as np
import pytest

import groupnorm
from groupnorm import group_norm, group_norm_vjp
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import oracle
from tests.rows import (
    CONTRACT,
    GRADIENT,
    GRADIENT_FAR,
    ROWS,
    Differentiated,
    assert_close,
    assert_gradients,
    compiles,
    differentiate,
    run,
)

LAYOUTS = {"last": (-1, (2, 16, 17, 32)), "first": (1, (2, 32, 16, 17))}
BOUNDS = {0: GRADIENT, 1: GRADIENT, 1e3: GRADIENT_FAR}


def draw(rng, shape, axis, offset=0.0):
    x = (offset + rng.normal(size=shape)).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    scale = rng.uniform(0.5, 1.5, size=shape[axis]).astype(np.float32)
    return x, dy, scale, rng.normal(size=shape[axis]).astype(np.float32)


def position_mask(rng, shape, axis):
    mask_shape = list(shape)
    mask_shape[axis] = 1
    return rng.random(mask_shape) < 0.7


def check_accuracy(backend, how, layout, fast, masked, rng):
    axis, shape = LAYOUTS[layout]
    mask = position_mask(rng, shape, axis) if masked else None
    for offset, bound in BOUNDS.items():
        x, dy, scale, bias = draw(rng, shape, axis, offset)
        keywords = {"num_groups": 4, "feature_axis": axis, "mask": mask}
        got = differentiate(
            backend, x, dy, scale, bias, how=how, use_fast_variance=fast, **keywords
        )
        reference = oracle.group_norm(x, scale, bias, **keywords)
        # y = xhat * scale + bias, with scale up to 1.5: two roundings beyond the contract.
        assert_close(got.y, reference, tolerance=2 * CONTRACT)
        want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
        assert_gradients(got, want, rtol=bound)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_by_vjp(wide_backend, layout, fast, masked, rng):
    check_accuracy(wide_backend, "vjp", layout, fast, masked, rng)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_by_autodiff(autodiff_backend, layout, fast, masked, rng):
    check_accuracy(autodiff_backend, "autodiff", layout, fast, masked, rng)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_compiled_by_torch(layout, masked, rng):
    try:
        check_accuracy(ROWS["torch:compile"], "autodiff", layout, True, masked, rng)
    finally:
        importlib.import_module("torch")._dynamo.reset()


@pytest.mark.parametrize("given", ["neither", "scale", "bias", "both"])
@pytest.mark.parametrize("how", ["vjp", "autodiff"])
def test_gradients_of_absent_parameters_are_none(autodiff_backend, how, given, rng):
    """`differentiate` asserts None where an argument is absent."""
    check_absent(autodiff_backend, how, given, rng)


@pytest.mark.parametrize("given", ["neither", "scale", "bias", "both"])
def test_gradients_of_absent_parameters_are_none_by_vjp(quick_backend, given, rng):
    check_absent(quick_backend, "vjp", given, rng)


def check_absent(backend, how, given, rng):
    x, dy, scale, bias = draw(rng, (3, 20, 12), -1)
    scale = scale if given in ("scale", "both") else None
    bias = bias if given in ("bias", "both") else None
    got = differentiate(backend, x, dy, scale, bias, how=how, num_groups=3)
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=3)
    assert_gradients(got, want, rtol=GRADIENT)


def test_the_output_of_vjp_equals_group_norm(backend, rng):
    x, dy, scale, bias = draw(rng, (3, 20, 12), -1)
    got = differentiate(backend, x, dy, scale, bias, num_groups=3)
    alone = run(backend, x, scale, bias, num_groups=3).values
    if compiles(backend):
        # Different outputs are fused differently: equal up to rounding, not bit for bit.
        assert_close(got.y, alone.astype(np.float64), tolerance=CONTRACT)
    else:
        np.testing.assert_array_equal(got.y, alone)


def test_a_pullback_may_be_called_more_than_once(backend, rng):
    if compiles(backend):
        pytest.skip("one traced program; eager rows cover it")
    x, dy, scale, bias = draw(rng, (3, 20, 12), -1)
    given = [backend.asarray(a) for a in (x, scale, bias)]
    _, pullback = group_norm_vjp(*given, num_groups=3)
    first, second, doubled = (pullback(backend.asarray(d)) for d in (dy, dy, 2 * dy))
    for a, b, c in zip(first, second, doubled, strict=True):
        a, b, c = (backend.to_numpy(g) for g in (a, b, c))
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(c, 2 * a, rtol=1e-6, atol=1e-6)


def test_gradients_are_named(rng):
    x, dy, scale, bias = draw(rng, (3, 20, 12), -1)
    grads = group_norm_vjp(x, scale, bias, num_groups=3)[1](dy)
    assert [g.shape for g in (grads.x, grads.scale, grads.bias)] == [(3, 20, 12), (12,), (12,)]


def test_a_gradient_is_never_the_cotangent_itself():
    dy = np.ones(4, np.float32)
    gradients = group_norm_vjp(dy, None, dy, num_groups=2)[1](dy)
    assert not np.shares_memory(gradients.bias, dy)


def test_the_layer_s_vjp(rng):
    x, dy, scale, bias = draw(rng, (3, 20, 12), -1)
    layer = groupnorm.GroupNorm(
        (12,), num_groups=3, scale_init=lambda shape: scale, bias_init=lambda shape: bias
    )
    mask = position_mask(rng, x.shape, -1)
    y, pullback = layer.vjp(x, mask)
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=3, mask=mask)
    np.testing.assert_array_equal(y, layer(x, mask))
    assert_gradients(tuple_with_y(y, pullback(dy)), want, rtol=GRADIENT)


def tuple_with_y(y, grads):
    return Differentiated(y, grads.x, grads.scale, grads.bias)


@pytest.mark.parametrize("how", ["vjp", "autodiff"])
def test_gradients_of_a_constant_group_are_finite(autodiff_backend, how, rng):
    check_constant(autodiff_backend, how, rng)


def test_gradients_of_a_constant_group_are_finite_by_vjp(quick_backend, rng):
    check_constant(quick_backend, "vjp", rng)


def check_constant(backend, how, rng):
    x, dy, scale, bias = draw(rng, (2, 20, 12), -1)
    x[0] = 3.7
    got = differentiate(backend, x, dy, scale, bias, how=how, num_groups=3, epsilon=1e-3)
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=3, epsilon=1e-3)
    assert_gradients(got, want, rtol=1e-5)
    still = differentiate(backend, x, dy, scale, bias, how=how, num_groups=3, epsilon=0)
    assert all(np.isfinite(g).all() for g in still)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_torch_gradcheck_to_second_order(masked, rng):
    torch = importlib.import_module("torch")
    x = torch.from_numpy(rng.normal(size=(2, 5, 4))).requires_grad_()
    scale, bias = (torch.from_numpy(rng.normal(size=4)).requires_grad_() for _ in range(2))
    mask = torch.from_numpy(rng.random((2, 5, 1)) < 0.6) if masked else None

    def f(x, scale, bias):
        return group_norm(x, scale, bias, num_groups=2, mask=mask, epsilon=1e-3)

    assert torch.autograd.gradcheck(f, (x, scale, bias))
    assert torch.autograd.gradgradcheck(f, (x, scale, bias))


@pytest.mark.needs("jax")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_jax_gradients_to_second_order(masked, rng):
    jax = importlib.import_module("jax")
    check_grads = importlib.import_module("jax.test_util").check_grads
    with jax.enable_x64(True):
        x, scale, bias = rng.normal(size=(2, 5, 4)), rng.normal(size=4), rng.normal(size=4)
        mask = rng.random((2, 5, 1)) < 0.6 if masked else None

        @jax.jit
        def f(x, scale, bias):
            return group_norm(x, scale, bias, num_groups=2, mask=mask, epsilon=1e-3)

        arguments = [jax.numpy.asarray(a) for a in (x, scale, bias)]
        check_grads(f, arguments, order=2, modes=["fwd", "rev"])


@pytest.mark.needs("torch")
@pytest.mark.parametrize("argument", ["x", "scale", "bias"])
def test_torch_computes_only_the_required_gradient(argument, rng):
    """Only one leaf requires a gradient."""
    torch = importlib.import_module("torch")
    x, dy, scale, bias = draw(rng, (3, 20, 12), -1)
    arrays = dict(zip(("x", "scale", "bias"), map(torch.from_numpy, (x, scale, bias)), strict=True))
    arrays[argument].requires_grad_()
    y = group_norm(**arrays, num_groups=3)
    (grad,) = torch.autograd.grad(y, [arrays[argument]], torch.from_numpy(dy))
    want = getattr(oracle.group_norm_gradients(x, dy, scale, bias, num_groups=3), argument)
    np.testing.assert_allclose(grad.numpy(), want, rtol=0, atol=GRADIENT * np.abs(want).max())


@pytest.mark.needs("torch")
def test_numpy_parameters_are_constants_for_a_tensor(rng):
    torch = importlib.import_module("torch")
    x, dy, scale, bias = draw(rng, (3, 20, 12), -1)
    given = torch.from_numpy(x).requires_grad_()
    y = group_norm(given, scale, bias, num_groups=3)
    (grad,) = torch.autograd.grad(y, [given], torch.from_numpy(dy))
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=3).x
    np.testing.assert_allclose(grad.numpy(), want, rtol=0, atol=GRADIENT * np.abs(want).max())


@pytest.mark.parametrize("implementation", [None, "portable", "fused"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_complex_cotangent_of_a_real_result_is_refused(backend, implementation, activation, rng):
    """Its imaginary part would be lost; a cotangent of a complex result may be either."""
    x, dy, scale, _ = draw(rng, (2, 5, 8), -1)
    given = [backend.asarray(a) for a in (x, scale)]
    options = {"num_groups": 4, "activation": activation}
    try:
        _, pullback = group_norm_vjp(*given, **options, implementation=implementation)
    except ArgumentValueError:  # not every row has kernels
        assert implementation == "fused"
        return
    imaginary = backend.asarray((dy + 1j * dy[::-1]).astype(np.complex64))
    with pytest.raises(ArgumentTypeError, match=r"dy has dtype .*complex64"):
        pullback(imaginary)
    if activation is None and implementation != "fused":
        given = [backend.asarray(a.astype(np.complex64)) for a in (x, scale)]
        _, pullback = group_norm_vjp(*given, **options, implementation=implementation)
        real = pullback(backend.asarray(dy))
        same = pullback(backend.asarray(dy.astype(np.complex64)))
        np.testing.assert_array_equal(*(backend.to_numpy(g.x) for g in (real, same)))
