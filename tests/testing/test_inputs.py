"""Hard inputs, NaN padding and layouts are what they say."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupnorm import testing
from groupnorm.errors import ArgumentTypeError, ArgumentValueError


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 8, 5), (7,), (1, 1), (0, 3), ()], ids=str)
def test_hard_inputs_are_finite_and_of_the_shape(shape, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    found = testing.hard_inputs(shape, dtype)
    assert len(found) >= 10
    for name, x in found.items():
        assert x.shape == shape, name
        assert x.dtype == np.dtype(dtype), name
        assert np.isfinite(x.astype(np.float64)).all(), name


def test_hard_inputs_are_hard():
    found = testing.hard_inputs((4, 8, 50))
    for k in range(1, 6):
        x = found[f"offset 1e{k}"].astype(np.float64)
        assert x.mean() == pytest.approx(10.0**k, rel=0.1)
        assert 0.8 < x.std() < 1.2
    assert np.abs(found["spike"]).max() == 1e4
    assert (np.diff(found["sorted"].ravel()) >= 0).all()
    assert (np.diff(found["ramp"].ravel()) > 0).all()
    assert np.ptp(found["constant"]) == 0
    assert 0 < np.abs(found["subnormal"]).max() < np.finfo(np.float32).tiny
    assert np.abs(found["huge"]).max() > 1e19
    assert np.abs(found["tiny"]).max() < 1e-19
    means = testing.hard_inputs((4, 8, 50), axis=1)["channel means"].mean(axis=(0, 2))
    assert means.std() > 100


def test_hard_inputs_by_seed_and_name():
    one, other = testing.hard_inputs((9,), seed=1), testing.hard_inputs((9,), seed=2)
    assert not np.array_equal(one["normal"], other["normal"])
    some = testing.hard_inputs((9,), seed=1, names=("normal", "ramp"))
    assert set(some) == {"normal", "ramp"}
    assert np.array_equal(some["normal"], one["normal"])
    with pytest.raises(ArgumentValueError, match="names='nromal' is not known"):
        testing.hard_inputs((9,), names=("nromal",))
    with pytest.raises(ArgumentTypeError, match="dtype='int32' is not a real floating"):
        testing.hard_inputs((9,), "int32")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.complex64])
def test_nan_padding(dtype, rng):
    x, mask = rng.normal(size=(3, 4)).astype(dtype), np.array([True, False, True, False])
    padded = testing.pad_with_nan(x, mask)
    assert padded.dtype == x.dtype
    assert np.array_equal(np.isnan(padded), ~np.broadcast_to(mask, x.shape))
    assert np.array_equal(padded[:, mask], x[:, mask])
    assert np.isfinite(x).all()


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (np.ones(3, int), np.ones(3, bool), ArgumentTypeError, "has no NaN"),
        (np.ones(3), np.ones(3), ArgumentTypeError, "pass booleans"),
        (np.ones(3), np.ones(4, bool), ArgumentValueError, "does not broadcast"),
    ],
)
def test_padding_that_cannot_be(x, mask, error, message):
    with pytest.raises(error, match=message):
        testing.pad_with_nan(x, mask)


@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (1, 1, 1, 1), (2, 0), ()], ids=str)
def test_layouts_hold_the_same_values(shape, rng):
    x = rng.normal(size=shape).astype(np.float32)
    for name, found in testing.layouts(x).items():
        assert np.array_equal(found, x), name


def test_layouts_are_what_they_say(rng):
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    found = testing.layouts(np.concatenate([x[:1], x[:1]]))
    assert found["Fortran"].flags.f_contiguous
    assert all(s < 0 for s in found["negative strides"].strides)
    assert not found["slice"].flags.contiguous
    assert found["channels last"].strides[1] == 4
    assert not found["read-only"].flags.writeable
    assert found["broadcast"].strides[0] == 0
    assert not found["unaligned"].flags.aligned
    assert found["big-endian"].dtype.byteorder == ">"


def test_the_file_of_a_mapped_array_goes_with_it(rng):
    mapped = testing.layouts(rng.normal(size=4))["memory-mapped"]
    path = Path(mapped.filename)
    assert path.exists()
    del mapped
    gc.collect()
    assert not path.parent.exists()


@given(testing.arrays("float32", max_dims=3), st.data())
def test_the_strategy_gives_hard_arrays(x, data):
    assert 1 <= x.ndim <= 3
    assert x.dtype.kind == "f"
    assert np.isfinite(x).all()
    y = data.draw(testing.arrays("float64", min_dims=2, max_dims=2, any_layout=False))
    assert y.ndim == 2
    assert y.flags.c_contiguous


def in_memory_order(x):
    """Wrong on purpose: x as if its memory were in C order."""
    return x.ravel("K").reshape(x.shape)


@pytest.mark.needs("array_api_strict", "dask", "jax", "torch")
def test_a_check_keeps_the_layouts(rng):
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    eager = "numpy:*,jax,torch,array_api_strict,dask"
    report = testing.check(lambda x: 2 * x, inputs=testing.layouts(x), rows=eager)
    report.raise_if_wrong()
    report = testing.check(
        in_memory_order, inputs=testing.layouts(x), reference=lambda x: x, rows="numpy"
    )
    assert {f.input for f in report.wrong} == {"Fortran", "channels last"}
    [numpy], [torch] = testing.rows("numpy"), testing.rows("torch")
    for name, found in testing.layouts(x).items():
        placed = numpy.asarray(found)
        assert placed.strides == found.strides, name
        assert placed.flags.aligned == found.flags.aligned, name
        assert placed.dtype.byteorder == found.dtype.byteorder, name
        assert placed.flags.writeable == (name != "read-only"), name
        assert not np.shares_memory(placed, found)
        if name in ("Fortran", "channels last", "slice"):
            assert torch.asarray(found).stride() == tuple(s // 4 for s in found.strides), name
