"""Scale and bias with a row for each sample, (N, C): adaptive group norm, FiLM, scale-shift."""

import importlib
import math

import numpy as np
import pytest

from groupnorm import GroupNorm, group_norm, group_norm_vjp, group_statistics, normalize
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import oracle
from tests.rows import (
    CONTRACT,
    GRADIENT,
    GRADIENT_FAR,
    ROWS,
    assert_close,
    assert_gradient,
    assert_gradients,
    assert_result,
    call_with_arrays,
    check_array,
    differentiate,
    host_dtype,
    run,
)

LAYOUTS = {
    "last": ((3, 6, 7, 8), {"feature_axis": -1}),
    "first": ((3, 8, 6, 7), {"feature_axis": 1}),
    "vector": ((5, 8), {"feature_axis": -1}),
    "two axes": ((3, 5, 2, 4), {"feature_axis": (2, 3)}),
    "apart": ((3, 4, 5, 2), {"feature_axis": (1, 3)}),
    "channels alone": ((3, 6, 8), {"feature_axis": -1, "reduction_axes": -1}),
}
FEW = {name: LAYOUTS[name] for name in ("last", "first", "apart")}


def drawn(rng, shape, feature_axis, offset=0.0):
    """Return x, dy, and scale and bias of shape (N, C)."""
    axes = np.atleast_1d(feature_axis)
    channels = int(np.prod([shape[a] for a in axes]))
    x = (offset + rng.normal(size=shape)).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    scale = rng.uniform(0.5, 1.5, size=(shape[0], channels)).astype(np.float32)
    return x, dy, scale, rng.normal(size=(shape[0], channels)).astype(np.float32)


def by_features(parameter, shape, feature_axis):
    """Return the parameter in the shape (N, *feature axes)."""
    return parameter.reshape(len(parameter), *(shape[a] for a in np.atleast_1d(feature_axis)))


@pytest.mark.parametrize("offset", [0, 1e5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values(quick_backend, layout, offset, rng):
    check_values(quick_backend, layout, offset, rng)


@pytest.mark.parametrize("layout", FEW)
def test_values_on_every_row(any_backend, layout, rng):
    check_values(any_backend, layout, 1e3, rng)


def check_values(any_backend, layout, offset, rng):
    shape, axes = LAYOUTS[layout]
    x, _, scale, bias = drawn(rng, shape, axes["feature_axis"], offset)
    want = oracle.group_norm(x, scale, bias, num_groups=4, **axes)
    got = run(any_backend, x, scale, bias, num_groups=4, **axes)
    assert_result(any_backend, got, want, tolerance=2 * CONTRACT)
    if layout in ("two axes", "apart") and not offset:
        scale, bias = (by_features(p, shape, axes["feature_axis"]) for p in (scale, bias))
        got = run(any_backend, x, scale, bias, num_groups=4, **axes)
        assert_result(any_backend, got, want, tolerance=2 * CONTRACT)


@pytest.mark.parametrize("how", ["masked", "relu", "silu", "gelu", "portable", "two-pass"])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_values_with_options(backend, layout, how, rng):
    shape, axes = LAYOUTS[layout]
    x, _, scale, bias = drawn(rng, shape, axes["feature_axis"])
    given, mask, options = x, None, {}
    if how == "masked":
        mask = rng.random(shape) < 0.7
        given = np.where(mask, x, np.float32(np.nan))
    elif how == "portable":
        options = {"implementation": "portable"}
    elif how == "two-pass":
        options = {"use_fast_variance": False}
    else:
        options = {"activation": how}
    want = oracle.group_norm(given, scale, bias, num_groups=4, mask=mask, **axes)
    if "activation" in options:
        want = activated(want, how)
    got = run(backend, given, scale, bias, num_groups=4, mask=mask, **axes, **options)
    assert_result(backend, got, want, tolerance=2 * CONTRACT)


def activated(z, name):
    erf = np.vectorize(math.erf)
    functions = {
        "relu": lambda z: np.maximum(z, 0),
        "silu": lambda z: z / (1 + np.exp(-z)),
        "gelu": lambda z: 0.5 * z * (1 + erf(z / np.sqrt(2))),
    }
    return functions[name](z)


@pytest.mark.parametrize("which", ["scale", "bias", "scale and (C,)", "(C,) and bias"])
def test_one_of_them_per_sample(backend, which, rng):
    shape, axes = LAYOUTS["first"]
    x, dy, scale, bias = drawn(rng, shape, 1)
    if which == "scale":
        bias = None
    elif which == "bias":
        scale = None
    elif which == "scale and (C,)":
        bias = bias[0].copy()
    else:
        scale = scale[0].copy()
    got = differentiate(backend, x, dy, scale, bias, num_groups=2, **axes)
    assert_close(
        got.y, oracle.group_norm(x, scale, bias, num_groups=2, **axes), tolerance=2 * CONTRACT
    )
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=2, **axes)
    assert_gradients(got, want, rtol=GRADIENT)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("layout", FEW)
def test_gradients_by_autodiff(autodiff_backend, layout, masked, rng):
    check_gradients(autodiff_backend, layout, masked, "autodiff", rng)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("layout", FEW)
def test_gradients_by_vjp(wide_backend, layout, masked, rng):
    check_gradients(wide_backend, layout, masked, "vjp", rng)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - FEW.keys()))
def test_gradients_of_other_layouts(quick_backend, layout, rng):
    check_gradients(quick_backend, layout, True, "vjp", rng)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("layout", FEW)
def test_gradients_compiled_by_torch(layout, rng):
    try:
        check_gradients(ROWS["torch:compile"], layout, False, "autodiff", rng)
    finally:
        importlib.import_module("torch")._dynamo.reset()


def check_gradients(row, layout, masked, how, rng):
    shape, axes = LAYOUTS[layout]
    for offset, bound in ((0, GRADIENT), (1e3, GRADIENT_FAR)):
        x, dy, scale, bias = drawn(rng, shape, axes["feature_axis"], offset)
        mask = rng.random(shape) < 0.7 if masked else None
        keywords = {"num_groups": 2, "mask": mask, **axes}
        got = differentiate(row, x, dy, scale, bias, how=how, **keywords)
        want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
        assert_gradients(got, want, rtol=bound)


@pytest.mark.parametrize(
    ("layout", "activation"), [("first", "silu"), ("last", "gelu"), ("last", "relu")]
)
def test_gradients_through_an_activation(backend, layout, activation, rng):
    shape, axes = LAYOUTS[layout]
    x, dy, scale, bias = drawn(rng, shape, axes["feature_axis"])
    got = differentiate(backend, x, dy, scale, bias, num_groups=2, activation=activation, **axes)
    z = oracle.group_norm(x, scale, bias, num_groups=2, **axes)
    step = 1e-6
    slope = (activated(z + step, activation) - activated(z - step, activation)) / (2 * step)
    want = oracle.group_norm_gradients(x, dy * slope, scale, bias, num_groups=2, **axes)
    assert_gradients(got, want, rtol=4 * GRADIENT)


LARGE = {
    "last": ((3, 9, 17, 32), {"feature_axis": -1}),
    "first": ((3, 32, 9, 17), {"feature_axis": 1}),
    "apart": ((3, 4, 160, 8), {"feature_axis": (1, 3)}),
    "one sample": ((1, 9, 60, 8), {"feature_axis": -1}),
    "one sample, two axes": ((1, 9, 20, 4, 8), {"feature_axis": (3, 4)}),
}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", LARGE)
def test_large_samples(quick_backend, layout, activation, rng):
    """For which each sample is a call."""
    shape, axes = LARGE[layout]
    x, dy, scale, bias = drawn(rng, shape, axes["feature_axis"], 1e3)
    got = differentiate(
        quick_backend, x, dy, scale, bias, num_groups=2, activation=activation, **axes
    )
    z = oracle.group_norm(x, scale, bias, num_groups=2, **axes)
    if activation is None:
        assert_close(got.y, z, tolerance=2 * CONTRACT)
    else:
        assert_close(got.y, activated(z, activation), tolerance=4 * CONTRACT)
        step = 1e-6
        dy = dy * (activated(z + step, activation) - activated(z - step, activation)) / (2 * step)
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=2, **axes)
    assert_gradients(got, want, rtol=GRADIENT_FAR)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("shape", [(3, 16, 17, 18), (1, 16, 17, 18), (3, 8, 3, 4), (20, 8, 3, 4)])
@pytest.mark.parametrize("how", ["autodiff", "vjp"])
def test_channels_last_memory(shape, how, rng):
    torch = importlib.import_module("torch")
    x, dy, scale, bias = drawn(rng, shape, 1)
    keywords = {"num_groups": 2, "feature_axis": 1}
    given, cotangent = (
        torch.from_numpy(a).contiguous(memory_format=torch.channels_last) for a in (x, dy)
    )
    leaves = [given, torch.from_numpy(scale), torch.from_numpy(bias)]
    if how == "vjp":
        y, pullback = group_norm_vjp(*leaves, **keywords)
        found = pullback(cotangent)
    else:
        y = group_norm(*(a.requires_grad_() for a in leaves), **keywords)
        found = torch.autograd.grad(y, leaves, cotangent)
    for a in (y, found[0]):
        assert a.is_contiguous(memory_format=torch.channels_last)
    y = y.detach().numpy()
    assert_close(y, oracle.group_norm(x, scale, bias, **keywords), tolerance=2 * CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    for a, b in zip(found, want, strict=True):
        assert_gradient(a.numpy(), b, rtol=GRADIENT)


@pytest.mark.needs("torch")
def test_one_sample_in_channels_last_memory_is_for_kernels(rng):
    """Its batch axis may have any stride."""
    torch = importlib.import_module("torch")
    x = torch.randn(2, 8, 9, 10).contiguous(memory_format=torch.channels_last)
    alone = x.unbind()[0][None]
    assert alone.stride()[0] != x.stride()[0]
    y = group_norm(alone, num_groups=2, feature_axis=1, implementation="fused")
    assert y.stride()[1:] == x.stride()[1:]
    torch.testing.assert_close(y, group_norm(x, num_groups=2, feature_axis=1)[:1])


@pytest.mark.parametrize("layout", ["first", "last"])
def test_a_row_equals_a_call_of_that_sample_alone(backend, layout, rng):
    shape, axes = LAYOUTS[layout]
    x, _, scale, bias = drawn(rng, shape, axes["feature_axis"])
    whole = run(backend, x, scale, bias, num_groups=4, **axes).values
    for i in range(shape[0]):
        alone = run(backend, x[i : i + 1], scale[i], bias[i], num_groups=4, **axes)
        np.testing.assert_allclose(whole[i : i + 1], alone.values, rtol=0, atol=CONTRACT)


@pytest.mark.parametrize("layout", ["first", "last", "two axes"])
def test_normalize(wide_backend, layout, rng):
    shape, axes = LAYOUTS[layout]
    x, _, scale, bias = drawn(rng, shape, axes["feature_axis"], 1e3)

    def function(x, scale, bias):
        known = group_statistics(x, num_groups=4, **axes)
        return normalize(x, known, scale, bias, num_groups=4, **axes)

    y, _ = call_with_arrays(wide_backend, function, x=x, scale=scale, bias=bias)
    check_array(wide_backend, y, shape=shape, dtype="float32")
    want = oracle.group_norm(x, scale, bias, num_groups=4, **axes)
    assert_close(wide_backend.to_numpy(y), want, tolerance=2 * CONTRACT)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("wanted", [None, "input"])
def test_half_precision(backend, dtype, wanted, rng):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy's bfloat16 comes from ml_dtypes")
    shape, axes = LAYOUTS["last"]
    x, _, scale, bias = drawn(rng, shape, -1)
    x = x.astype(host_dtype(dtype))
    got = run(backend, x, scale, bias, num_groups=4, dtype=wanted, **axes)
    want = oracle.group_norm(x, scale, bias, num_groups=4, **axes)
    result = "float32" if wanted is None else dtype
    tolerance = 2 * CONTRACT if wanted is None else {"float16": 2**-10, "bfloat16": 2**-7}[dtype]
    assert_result(backend, got, want, dtype=result, tolerance=tolerance)


@pytest.mark.parametrize("name", ["scale", "bias"])
@pytest.mark.parametrize("shape", [(2, 8), (3, 4), (3, 8, 1, 1), (8, 3), (1, 8)])
def test_wrong_shapes(quick_backend, name, shape, rng):
    x = rng.normal(size=(3, 8, 5, 4)).astype(np.float32)
    with pytest.raises(ArgumentValueError, match=rf"{name} has shape .*\(3, 8\)"):
        run(quick_backend, x, **{name: np.ones(shape, np.float32)}, num_groups=2, feature_axis=1)


def test_without_a_batch_axis_there_are_no_samples():
    x = np.ones((8, 3), np.float32)
    with pytest.raises(ArgumentValueError, match=r"scale has shape \(8, 3\)"):
        group_norm(x, np.ones((8, 3), np.float32), num_groups=1, reduction_axes=(0, 1))


def test_pullback_checks_its_cotangent():
    x, scale = np.ones((2, 3, 4), np.float32), np.ones((2, 4), np.float32)
    _, pullback = group_norm_vjp(x, scale, num_groups=2)
    with pytest.raises(ArgumentValueError, match="dy has shape"):
        pullback(np.ones((2, 4), np.float32))
    with pytest.raises(ArgumentTypeError, match="imaginary part"):
        pullback(np.ones((2, 3, 4), np.complex64))


def test_pullback_uses_the_values_of_the_call(rng):
    x, dy, scale, bias = drawn(rng, (3, 6, 8), -1)
    before = group_norm_vjp(x, scale.copy(), bias.copy(), num_groups=2, activation="silu")[1](dy)
    scale_now, bias_now = scale.copy(), bias.copy()
    _, pullback = group_norm_vjp(x, scale_now, bias_now, num_groups=2, activation="silu")
    scale_now[:] = 7
    bias_now[:] = -3
    for got, want in zip(pullback(dy), before, strict=True):
        np.testing.assert_array_equal(got, want)


def test_wider_and_complex_parameters(rng):
    x, dy, scale, bias = drawn(rng, (3, 6, 8), -1)
    y = group_norm(x, scale.astype(np.float64), bias, num_groups=2)
    assert y.dtype == np.float64
    want = oracle.group_norm(x, scale, bias, num_groups=2)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)
    turned = scale * np.exp(1j * bias).astype(np.complex64)
    y, pullback = group_norm_vjp(x, turned, bias, num_groups=2)
    assert y.dtype == np.complex64
    assert_close(y, oracle.group_norm(x, turned, bias, num_groups=2), tolerance=2 * CONTRACT)
    dy = dy + 1j * rng.normal(size=dy.shape).astype(np.float32)
    got, want = pullback(dy), oracle.group_norm_gradients(x, dy, turned, bias, num_groups=2)
    assert [g.dtype for g in got] == [np.float32, np.complex64, np.float32]
    assert_gradients(got, want, rtol=GRADIENT)


def test_a_layer_keeps_its_own_shape():
    layer = GroupNorm(8, num_groups=2)
    with pytest.raises(ArgumentValueError, match="scale has shape"):
        layer.scale = np.ones((3, 8), np.float32)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_an_empty_batch(backend, layout):
    shape, axes = {"first": ((0, 8, 5), 1), "last": ((0, 5, 8), -1)}[layout]
    x, rows = np.ones(shape, np.float32), np.ones((0, 8), np.float32)
    got = differentiate(backend, x, x, rows, rows, num_groups=2, feature_axis=axes)
    assert (got.y.shape, got.scale.shape) == (shape, (0, 8))


@pytest.mark.needs("torch")
@pytest.mark.parametrize("shape", [(2, 3, 9, 60, 8), (2, 3, 4, 5, 8), (2, 1, 9, 60, 8)])
def test_mapped_by_torch(shape, rng):
    torch = importlib.import_module("torch")
    x, rows = (torch.from_numpy(rng.normal(size=s)).float() for s in (shape, (*shape[:2], 8)))
    mapped = torch.func.vmap(lambda x, s: group_norm(x, s, s, num_groups=2))(x, rows)
    for y, a, s in zip(mapped, x, rows, strict=True):
        torch.testing.assert_close(y, group_norm(a, s, s, num_groups=2), rtol=1e-5, atol=1e-5)


@pytest.mark.needs("torch")
def test_memory_of_other_orders(rng):
    torch = importlib.import_module("torch")
    x = torch.from_numpy(rng.normal(size=(3, 8, 32, 32, 2))).float()[..., 0]
    rows = torch.ones(3, 8)
    keywords = {"num_groups": 2, "feature_axis": 1}
    assert group_norm(x, rows, **keywords).stride() == group_norm(x, rows[0], **keywords).stride()
