"""`activation` and `implementation`: values, gradients, layers and messages.

The reference is the oracle's normalization followed by the activation; in the backward pass, the
cotangent is multiplied by the activation's derivative first. Both are implemented here in float64,
with formulas other than the library's.
"""

import importlib
import math
import pickle

import numpy as np
import pytest

from groupnorm import GroupNorm, group_norm, group_norm_vjp
from groupnorm.dispatch import adapter_of
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.portable.activations import erfc
from groupnorm.testing import oracle
from tests.rows import (
    CONTRACT,
    GRADIENT,
    ROWS,
    assert_close,
    assert_gradients,
    assert_result,
    differentiate,
    host_dtype,
    run,
)

NAMES = ("relu", "silu", "gelu")
LAYOUTS = {"last": (-1, (2, 7, 5, 16)), "first": (1, (2, 16, 7, 5))}
# Looser than the contract: y = xhat * scale + bias, with scale up to 1.5 and slopes up to 1.13.
WITH_PARAMETERS = 2 * CONTRACT
each_activation = pytest.mark.parametrize("activation", NAMES)
each_implementation = pytest.mark.parametrize("implementation", [None, "portable"])
CASES = {"last": ("last", 0, False), "first": ("first", 0, False), "masked": ("first", 0, True)}

_normal = np.vectorize(lambda z: (1 + math.erf(z / math.sqrt(2))) / 2, otypes=[float])


def _sigmoid(z):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


def act(z: np.ndarray, name: str) -> np.ndarray:
    """The activation, in float64."""
    if name == "relu":
        return np.maximum(z, 0)
    return z * (_sigmoid(z) if name == "silu" else _normal(z)) if name else z


def slope(z: np.ndarray, name: str) -> np.ndarray:
    """Its derivative; relu's is 0 at 0."""
    if not name:
        return np.ones_like(z)
    if name == "relu":
        return (z > 0).astype(float)
    if name == "silu":
        return _sigmoid(z) * (1 + z * _sigmoid(-z))
    return _normal(z) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def reference(x, scale, bias, activation, **keywords):
    return act(oracle.group_norm(x, scale, bias, **keywords), activation)


def reference_gradients(x, dy, scale, bias, activation, **keywords):
    """The chain rule by hand: dz = dy * act'(z), and that is the normalization's cotangent."""
    z = oracle.group_norm(x, scale, bias, **keywords)
    return oracle.group_norm_gradients(x, dy * slope(z, activation), scale, bias, **keywords)


def draw(rng, layout="last", offset=0.0, masked=False):
    """Return x, scale, bias and keywords; positions that the mask excludes are NaN."""
    axis, shape = LAYOUTS[layout]
    x = (offset + rng.normal(size=shape)).astype(np.float32)
    scale = rng.uniform(0.5, 1.5, size=16).astype(np.float32)
    bias = rng.normal(size=16).astype(np.float32)
    mask = None
    if masked:
        mask = rng.random([1 if i == axis % 4 else n for i, n in enumerate(shape)]) < 0.7
        x = np.where(mask, x, np.float32(np.nan))
    return x, scale, bias, {"num_groups": 4, "feature_axis": axis, "mask": mask}


def draw_cotangent(rng, x, scale, bias, away=1e-3, **keywords):
    """Return a random cotangent, with 0 where rounding decides the side of relu's kink z is on."""
    dy = rng.normal(size=x.shape).astype(np.float32)
    dy[np.abs(oracle.group_norm(x, scale, bias, **keywords)) < away] = 0
    return dy


@each_activation
@pytest.mark.parametrize("drawn", CASES)
@pytest.mark.parametrize("offset", [0, 1e4])
def test_forward(backend, activation, drawn, offset, rng):
    layout, _, masked = CASES[drawn]
    x, scale, bias, keywords = draw(rng, layout, offset, masked)
    keywords["activation"] = activation
    want = reference(x, scale, bias, **keywords)
    assert np.isfinite(want).all()
    got = run(backend, x, scale, bias, **keywords)
    assert_result(backend, got, want, tolerance=WITH_PARAMETERS)


@pytest.mark.parametrize("activation", [*NAMES, None])
def test_portable_equals_the_default(backend, activation, rng):
    *arrays, keywords = draw(rng)
    keywords["activation"] = activation
    portable = run(backend, *arrays, implementation="portable", **keywords)
    want = reference(*arrays, **keywords)
    assert_result(backend, portable, want, tolerance=WITH_PARAMETERS)
    assert_result(backend, run(backend, *arrays, **keywords), portable.values.astype(float))


@each_activation
@each_implementation
def test_nan_stays_nan(backend, activation, implementation, rng):
    x, scale, bias, keywords = draw(rng)
    x[0, 3, 3, 1] = np.nan
    keywords["activation"] = activation
    want = reference(x, scale, bias, **keywords)
    assert np.isnan(want).sum() == want.size / 8  # one group of eight
    got = run(backend, x, scale, bias, implementation=implementation, **keywords)
    assert_result(backend, got, want, tolerance=WITH_PARAMETERS)


@each_activation
@each_implementation
@pytest.mark.parametrize("size", [1e4, 1e25])
def test_large_values_stay_finite(backend, activation, implementation, size, rng):
    x, _, bias, keywords = draw(rng)
    scale = np.full(16, size, np.float32)
    # Only where the slope depends on the sign of z alone: near 0 it depends on the rounding of z.
    dy = draw_cotangent(rng, x, scale, bias, away=1e-3 * size, **keywords)
    keywords["activation"] = activation
    got = differentiate(backend, x, dy, scale, bias, implementation=implementation, **keywords)
    want = reference(x, scale, bias, **keywords)
    assert_close(got.y / size, want / size, tolerance=WITH_PARAMETERS)
    assert_gradients(got, reference_gradients(x, dy, scale, bias, **keywords), rtol=GRADIENT)


@each_activation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_dtypes_are_rounded_after_the_activation(
    backend, activation, dtype, rng, needs_bfloat16
):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.library} has no {dtype}")
    x, scale, bias, keywords = draw(rng)
    x = x.astype(host_dtype(dtype))
    result = run(backend, x, scale, bias, dtype="input", activation=activation, **keywords)
    want = reference(x, scale, bias, activation, **keywords)
    half = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert_result(backend, result, want, dtype=dtype, tolerance=half + WITH_PARAMETERS)
    error = np.abs(result.values.astype(float) - want)
    # One rounding, relative to each value: rounding z as well would give about two.
    assert (error <= 1.01 * half * np.abs(want) + WITH_PARAMETERS).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_erfc(quick_backend, dtype):
    x = np.linspace(-6, 12, 3001).astype(dtype)
    given = quick_backend.asarray(x)
    got = quick_backend.to_numpy(erfc(given, adapter_of(given)))
    assert got.dtype == dtype
    wide = x.astype(np.float64)
    want = np.array([math.erfc(value) for value in wide])
    # Rounding x**2 perturbs the exponent; in float32 down to the smallest normal.
    info = np.finfo(dtype)
    bound = 1e-13 if dtype == "float64" else info.eps * (4 + wide**2)
    assert (np.abs(got - want) <= bound * want + info.tiny).all()


def check(backend, x, dy, scale, bias, activation, *, hows=(), **keywords):
    keywords["activation"] = activation
    want = reference(x, scale, bias, **keywords)
    want_gradients = reference_gradients(x, dy, scale, bias, **keywords)
    for how in hows or ["vjp"] + ["autodiff"] * ("autodiff" not in backend.cannot):
        # Where there are no kernels, both are the same.
        for implementation in (None, "portable")[: 1 + (backend.library in ("numpy", "torch"))]:
            options = {"how": how, "implementation": implementation, **keywords}
            got = differentiate(backend, x, dy, scale, bias, **options)
            assert_close(got.y, want, tolerance=WITH_PARAMETERS)
            assert_gradients(got, want_gradients, rtol=GRADIENT)


@each_activation
@pytest.mark.parametrize("drawn", CASES)
def test_gradients(backend, activation, drawn, rng):
    x, scale, bias, keywords = draw(rng, *CASES[drawn])
    dy = draw_cotangent(rng, x, scale, bias, **keywords)
    check(backend, x, dy, scale, bias, activation, **keywords)


@each_activation
def test_slopes_at_0(backend, activation, rng):
    """Constant groups are exactly 0; the slope there is 0 for relu and 1/2 for the others."""
    x, dy = np.full((2, 5, 16), 3, np.float32), rng.normal(size=(2, 5, 16)).astype(np.float32)
    scale, bias = np.ones(16, np.float32), np.zeros(16, np.float32)
    at_0 = 0 if activation == "relu" else 0.5
    want = reference_gradients(x, dy, scale, bias, activation, num_groups=4).bias
    np.testing.assert_allclose(want, at_0 * dy.sum((0, 1)), rtol=1e-4)
    check(backend, x, dy, scale, bias, activation, num_groups=4)


@pytest.mark.slow
@pytest.mark.needs("torch")
def test_compiled_by_torch(rng):
    x, scale, bias, keywords = draw(rng)
    dy = rng.normal(size=x.shape).astype(np.float32)
    try:
        check(ROWS["torch:compile"], x, dy, scale, bias, "silu", hows=["autodiff"], **keywords)
    finally:
        importlib.import_module("torch")._dynamo.reset()


def param(row):
    return pytest.param(row, marks=pytest.mark.needs(row.library), id=row.library)


@pytest.mark.parametrize("row", [param(ROWS["numpy"]), param(ROWS["jax"]), param(ROWS["torch"])])
def test_a_layer_keeps_its_activation(row, rng):
    x, scale, bias, keywords = draw(rng)
    start = GroupNorm(16, num_groups=4, activation="gelu", implementation="portable")
    start.scale, start.bias = scale, bias
    there = start.to_backend(row.library)
    want = reference(x, scale, bias, "gelu", **keywords)
    for layer in (start, there, pickle.loads(pickle.dumps(there)), there.to_backend("numpy")):
        assert layer.activation == "gelu"
        assert layer.implementation == "portable"
        assert "activation='gelu', implementation='portable'" in repr(layer)
    assert_close(row.to_numpy(there(row.asarray(x))), want, tolerance=WITH_PARAMETERS)
    without = GroupNorm(8, num_groups=2, backend=row.library)
    assert without.activation is without.implementation is None
    assert "activation" not in repr(without)


@pytest.mark.needs("torch")
def test_a_torch_layer_with_an_activation_is_not_an_nn_group_norm():
    nn = importlib.import_module("torch").nn

    def layer(**keywords):
        return GroupNorm((8, ...), 0, num_groups=2, backend="torch", **keywords)

    assert isinstance(layer(), nn.GroupNorm)
    assert not isinstance(layer(activation="silu"), nn.GroupNorm)
    moved = layer(activation="relu").to_backend("numpy").to_backend("torch")
    assert isinstance(moved, nn.Module)
    assert not isinstance(moved, nn.GroupNorm)


@pytest.mark.parametrize("function", [group_norm, group_norm_vjp])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_an_activation_of_complex_values_raises(quick_backend, function, dtype):
    x, scale = (quick_backend.asarray(np.ones(8, name)) for name in (dtype, "complex64"))
    with pytest.raises(ArgumentTypeError, match=r"activation='silu' is given .* complex: .*Leave"):
        function(x, scale, num_groups=2, activation="silu")


def layer_call(x, **keywords):
    return GroupNorm(8, **keywords)(x)


KNOWN = {"activation": "'relu', 'silu', 'gelu'", "implementation": "'portable', 'fused', 'native'"}


@pytest.mark.parametrize("function", [group_norm, group_norm_vjp, layer_call])
@pytest.mark.parametrize("argument", KNOWN)
def test_unknown_names(function, argument):
    x, rule = np.ones((2, 8), np.float32), f"{KNOWN[argument]}, or None"
    with pytest.raises(ArgumentValueError, match=f"{argument}='swish' is not known: .*{rule}"):
        function(x, num_groups=2, **{argument: "swish"})
    for wrong in (1, True, math.tanh, ["relu"], b"relu"):
        message = f"{argument}=.* of type {type(wrong).__name__}: .*{rule}"
        with pytest.raises(ArgumentTypeError, match=message):
            function(x, num_groups=2, **{argument: wrong})


@pytest.mark.parametrize(
    "row", [param(ROWS["numpy"]), param(ROWS["jax"]), param(ROWS["array_api_strict"])]
)
@pytest.mark.parametrize("implementation", ["fused", "native"])
def test_an_unavailable_implementation_raises(row, implementation):
    if row.name in ("numpy", "jax") and implementation == "fused":
        pytest.skip(
            "NumPy has the compiled core, if it was built, and JAX has a CPU implementation"
        )
    x = row.asarray(np.ones((2, 8), np.float32))
    why = {"fused": "there are no kernels for", "native": "has no group normalization"}
    for call in (group_norm, layer_call, group_norm_vjp):
        if call is group_norm_vjp:
            why["native"] = "comes without a pullback"
        message = f"'{implementation}' cannot compute this call: .*{why[implementation]}.*portable"
        with pytest.raises(ArgumentValueError, match="implementation=" + message):
            call(x, num_groups=2, implementation=implementation)
