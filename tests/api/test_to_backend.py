"""Conversion between any two backends: the same layer, with bitwise equal parameters."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest

from groupnorm import GroupNorm
from groupnorm.errors import GroupNormError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, ROWS, assert_close, host_dtype

NAMES = ("numpy", "jax", "torch", "mlx")
PAIRS = [
    pytest.param(*pair, marks=pytest.mark.needs(*pair), id="-".join(pair))
    for pair in itertools.product(NAMES, NAMES)
]
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64")
OPTIONS = (
    "in_size",
    "feature_axis",
    "num_groups",
    "group_size",
    "epsilon",
    "dtype",
    "use_bias",
    "use_scale",
    "reduction_axes",
    "axis_name",
    "axis_index_groups",
    "use_fast_variance",
    "param_dtype",
)


def any_bits(dtype: str, shape, rng) -> np.ndarray:
    """Values of arbitrary bits, except NaN, whose bits no library guarantees to keep."""
    out = host_dtype(dtype)
    if out.kind == "c":
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(out)
    values = (rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, shape)).astype(out)
    values.flat[:4] = [0.0, -0.0, np.finfo(np.float16).tiny, np.inf]
    return values


def host_layer(dtype: str, rng, in_size=(2, 5, 4), feature_axis=(0, 2), **keywords):
    layer = GroupNorm(in_size, feature_axis, num_groups=4, param_dtype=dtype, **keywords)
    for name in ("scale", "bias"):
        if getattr(layer, name) is not None:
            setattr(layer, name, any_bits(dtype, layer.scale.shape, rng))
    return layer


def precision(first: str, second: str, dtype: str):
    """JAX has no 64-bit types unless enabled."""
    wants = "jax" in (first, second)
    return (ROWS["jax"] if wants else ROWS["numpy"]).precision(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_bits_survive(first, second, dtype, rng, request):
    if dtype == "bfloat16":
        request.getfixturevalue("needs_bfloat16")
    with precision(first, second, dtype):
        start = host_layer(dtype, rng)
        there = start.to_backend(first).to_backend(second)
        assert there.backend == second
        back = there.to_backend("numpy")
        for name in ("scale", "bias"):
            given, got = getattr(start, name), getattr(back, name)
            assert got.dtype == given.dtype
            assert got.shape == given.shape == (2, 4)
            assert got.tobytes() == given.tobytes()
            held = getattr(there, name)
            assert str(held.dtype).rpartition(".")[2] == dtype


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_options_survive(first, second, rng):
    start = GroupNorm(
        (5, 12),
        -1,
        num_groups=None,
        group_size=3,
        backend=first,
        epsilon=0.25,
        dtype="input",
        use_bias=False,
        reduction_axes=(1, 2),
        use_fast_variance=False,
    )
    other = start.to_backend(second)
    for name in OPTIONS:
        assert getattr(other, name) == getattr(start, name), name
    assert other.bias is None
    x = rng.normal(size=(3, 5, 12)).astype(np.float16)
    y = other(ROWS[second].asarray(x))
    assert str(y.dtype).endswith("float16")
    want = oracle.group_norm(x, group_size=3, epsilon=0.25, reduction_axes=(1, 2))
    np.testing.assert_allclose(ROWS[second].to_numpy(y), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_results_agree(first, second, rng):
    layer = GroupNorm((..., 8), num_groups=4)
    layer.scale, layer.bias = rng.normal(size=(2, 8)).astype(np.float32)
    x = (rng.normal(size=(2, 5, 8)) + 1e3).astype(np.float32)
    want = oracle.group_norm(x, layer.scale, layer.bias, num_groups=4)
    layer = layer.to_backend(first).to_backend(second)
    y = layer(ROWS[second].asarray(x))
    assert_close(ROWS[second].to_numpy(y), want, tolerance=2 * CONTRACT)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.needs(n)) for n in NAMES])
def test_the_copy_is_independent(name, rng):
    layer = host_layer("float32", rng)
    before = layer.scale.copy()
    other = (
        layer.to_backend(name).to_backend("numpy") if name != "numpy" else layer.to_backend(name)
    )
    assert other is not layer
    other.scale[...] = 7
    np.testing.assert_array_equal(layer.scale, before)


@pytest.mark.needs("torch")
def test_torch_copy_shares_no_memory_with_numpy(rng):
    torch = importlib.import_module("torch")
    layer = host_layer("float32", rng)
    before = layer.scale.copy()
    other = layer.to_backend("torch")
    with torch.no_grad():
        other.weight.fill_(7)
    np.testing.assert_array_equal(layer.scale, before)
    back = other.to_backend("numpy")
    with torch.no_grad():
        other.weight.fill_(9)
    assert (back.scale == 7).all()


@pytest.mark.needs("torch")
def test_torch_layer_class_depends_on_the_options():
    torch = importlib.import_module("torch")
    native = GroupNorm((8, ...), 0, num_groups=4).to_backend("torch")
    assert isinstance(native, torch.nn.GroupNorm)
    plain = GroupNorm(8, num_groups=4).to_backend("torch")
    assert isinstance(plain, torch.nn.Module)
    assert not isinstance(plain, torch.nn.GroupNorm)


@pytest.mark.needs("torch")
def test_device_and_param_type_of_torch():
    torch = importlib.import_module("torch")
    layer = GroupNorm(8, num_groups=4).to_backend("torch", device=torch.device("cpu"))
    assert layer.weight.device == torch.device("cpu")
    with pytest.raises(GroupNormError, match="device"):
        GroupNorm(8, num_groups=4).to_backend("torch", device="nonsense")


@pytest.mark.needs("jax")
@pytest.mark.several_jax_devices
def test_device_of_jax():
    device = importlib.import_module("jax").devices()[1]
    layer = GroupNorm(8, num_groups=4).to_backend("jax", device=device)
    assert layer.scale.devices() == layer.bias.devices() == {device}
    assert GroupNorm(8, num_groups=4, backend="jax", device=device).scale.devices() == {device}


@pytest.mark.needs("jax")
def test_float64_with_jax_in_32_bit_mode_raises(rng):
    """JAX would narrow to float32; values must stay exactly equal, so this raises."""
    with pytest.raises(GroupNormError, match="float64"):
        host_layer("float64", rng).to_backend("jax")


@pytest.mark.parametrize("name", ["tensorflow", None, 3], ids=repr)
def test_unknown_backend(name):
    with pytest.raises(GroupNormError, match="backend"):
        GroupNorm(8, num_groups=4).to_backend(name)
