"""CuPy: without a driver its adapter can be imported and raises clear errors; with a GPU it works.

The CuPy package is the real one in both cases. The `cupy` row of the other test files exists only
with a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys

import cupy
import numpy as np
import pytest

from groupnorm import GroupNorm, available_backends, group_norm, group_norm_vjp
from groupnorm.adapter import Unsupported
from groupnorm.backends.kernels.gpu.launch import planned
from groupnorm.dispatch import adapter_named, adapter_of
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, BackendImportError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient

CHANNELS, GROUPS = 8, 4


def count_devices() -> int:
    with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
        return cupy.cuda.runtime.getDeviceCount()
    return 0


GPU = count_devices() > 0
without_gpu = pytest.mark.skipif(GPU, reason="there is a GPU, so nothing raises")


def on_gpu(function):
    """Mark a test that computes on a GPU."""
    skip = pytest.mark.skipif(not GPU, reason="no GPU that CuPy can use")
    return pytest.mark.gpu(skip(function))


def unplaced_array(kind=cupy.ndarray) -> cupy.ndarray:
    """Return a CuPy array without memory: the only kind that can exist without a driver."""
    return cupy._core.core._ndarray_base.__new__(kind, (1,))


def test_adapter_is_imported_without_a_driver():
    program = (
        "import sys, groupnorm.dispatch as d; assert 'cupy' not in sys.modules;"
        "a = d.adapter_named('cupy'); assert 'cupy' in sys.modules; print(a.name)"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cupy"


@without_gpu
def test_cupy_arrays_are_dispatched_to_the_cupy_adapter():
    assert adapter_of(unplaced_array()) is adapter_named("cupy")
    assert adapter_named("cupy").array_name == "CuPy arrays"

    class Derived(cupy.ndarray):
        pass

    assert adapter_of(unplaced_array(Derived)) is adapter_named("cupy")


def test_bfloat16_needs_no_gpu_to_be_planned():
    """CuPy computes in bfloat16, whose dtype is ml_dtypes'; array-api-compat does not know it."""
    adapter, bfloat16 = adapter_named("cupy"), np.dtype("bfloat16")
    assert adapter.dtype("bfloat16") == bfloat16
    assert adapter.is_real_floating(bfloat16)
    assert not adapter.is_complex(bfloat16)
    assert adapter.result_type(bfloat16, np.float32) == np.float32
    assert adapter.result_type(bfloat16, np.float16) == np.float32
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, dtype="input")
    strides = (3 * CHANNELS, CHANNELS, 1)
    work = planned(
        adapter, (2, 3, CHANNELS), strides, bfloat16, bfloat16, None, layer._config.options
    )
    assert not isinstance(work, Unsupported), work
    assert work.dtypes.result_dtype == bfloat16


@without_gpu
def test_layer_without_a_gpu():
    with pytest.raises(BackendImportError) as caught:
        GroupNorm(CHANNELS, num_groups=GROUPS, backend="cupy")
    for part in ("backend='cupy'", "GPU", "driver", "backend='numpy'"):
        assert part in str(caught.value)


@without_gpu
@pytest.mark.parametrize("device", [0, "cuda:0", None])
def test_conversion_without_a_gpu(device):
    with pytest.raises(BackendImportError, match=r"backend='cupy'.*GPU"):
        GroupNorm(CHANNELS, num_groups=GROUPS).to_backend("cupy", device=device)


@without_gpu
def test_layer_without_parameters_without_a_gpu():
    """No device is needed until the layer is called with an array, which is on one."""
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, use_scale=False, use_bias=False, backend="cupy")
    assert layer.backend == "cupy"
    with pytest.raises(ArgumentTypeError) as caught:
        layer(np.ones((2, CHANNELS)))
    for part in ("CuPy", "NumPy", "to_backend"):
        assert part in str(caught.value)


@without_gpu
def test_argument_errors_precede_the_missing_gpu_error():
    with pytest.raises(ArgumentValueError, match="num_groups"):
        GroupNorm(CHANNELS, num_groups=3, backend="cupy")


def test_available_backends_reports_what_is_missing():
    [info] = [info for info in available_backends() if info.name == "cupy"]
    assert info.installed
    assert info.version == cupy.__version__
    if GPU:
        assert len(info.devices) == count_devices()
        assert info.error is None
        assert info.why_not_fused["cuda:0"] is None
        assert "fused" in info.implementations["cuda:0"]
    else:
        assert info.devices == ()
        assert info.implementations == {}
        assert "driver" in info.error


def test_cupy_masks_and_parameters_require_cupy_input():
    mask = cupy.ones((2, 1), dtype=bool) if GPU else unplaced_array()
    with pytest.raises(ArgumentTypeError, match="mask"):
        group_norm(np.ones((2, CHANNELS)), num_groups=GROUPS, mask=mask)


def arrays(rng, *shape):
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    return x, dy, *rng.normal(size=(2, shape[-1])).astype(np.float32)


@on_gpu
@pytest.mark.parametrize("offset", [0, 1e3, 1e5])
@pytest.mark.parametrize("fast", [True, False])
def test_layer_computes(fast, offset, rng):
    x, dy, scale, bias = arrays(rng, 3, 9, 7, CHANNELS)
    x += np.float32(offset)
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="cupy", use_fast_variance=fast)
    layer.scale, layer.bias = cupy.asarray(scale), cupy.asarray(bias)
    y, pullback = layer.vjp(cupy.asarray(x))
    assert isinstance(y, cupy.ndarray)
    want = oracle.group_norm(x, scale, bias, num_groups=GROUPS)
    assert_close(y.get(), want, tolerance=2 * CONTRACT)
    if offset <= 1e3:
        grads = pullback(cupy.asarray(dy))
        want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=GROUPS)
        for got, reference in zip(grads, want, strict=True):
            assert_gradient(got.get(), reference, rtol=1e-4 if offset else GRADIENT)


@on_gpu
def test_mask_with_nan_in_the_padding(rng):
    x, dy, scale, bias = arrays(rng, 2, 9, CHANNELS)
    mask = np.ones((2, 9, 1), bool)
    mask[1, 4:] = False
    x[1, 4:] = np.nan
    for given in (mask, cupy.asarray(mask), mask.tolist()):
        y, pullback = group_norm_vjp(
            *(cupy.asarray(a) for a in (x, scale, bias)), num_groups=GROUPS, mask=given
        )
        want = oracle.group_norm(x, scale, bias, num_groups=GROUPS, mask=mask)
        assert_close(y.get(), want, tolerance=2 * CONTRACT)
        want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=GROUPS, mask=mask)
        assert_gradient(pullback(cupy.asarray(dy)).x.get(), want.x, rtol=GRADIENT)


@on_gpu
def test_large_groups_are_reproducible_bit_for_bit(rng):
    x = cupy.asarray((rng.normal(size=(1, 1 << 18, CHANNELS)) + 1e4).astype(np.float32))
    first, second = (group_norm(x, num_groups=GROUPS) for _ in range(2))
    assert first.get().tobytes() == second.get().tobytes()
    want = oracle.group_norm(x.get(), num_groups=GROUPS)
    assert_close(first.get(), want, tolerance=CONTRACT)


@on_gpu
@pytest.mark.parametrize("device", [None, 0, "cuda:0", cupy.cuda.Device(0) if GPU else None])
def test_to_cupy_and_back(device, rng):
    host = GroupNorm((2, 5, 4), (0, 2), num_groups=GROUPS)
    host.scale = rng.normal(size=(2, 4)).astype(np.float32)
    layer = host.to_backend("cupy", device=device)
    assert isinstance(layer.scale, cupy.ndarray)
    assert layer.to_backend("numpy").scale.tobytes() == host.scale.tobytes()
    x = rng.normal(size=(3, 2, 5, 4)).astype(np.float32)
    want = oracle.group_norm(x, host.scale, host.bias, num_groups=GROUPS, feature_axis=(1, 3))
    for one in (layer, host):  # a NumPy layer accepts CuPy arrays too
        assert_close(one(cupy.asarray(x)).get(), want, tolerance=2 * CONTRACT)


@on_gpu
@pytest.mark.parametrize("how", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies(how, rng):
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="cupy")
    layer.scale = cupy.asarray(rng.normal(size=CHANNELS).astype(np.float32))
    other = how(layer)
    assert repr(other) == repr(layer)
    assert (other.scale == layer.scale).all()
    other.scale *= 2
    assert not (other.scale == layer.scale).all()


@on_gpu
def test_host_arrays_are_not_copied_implicitly():
    layer = GroupNorm(CHANNELS, num_groups=GROUPS, backend="cupy")
    with pytest.raises(ArgumentTypeError, match="to_backend"):
        layer(np.ones((2, CHANNELS)))


@on_gpu
@pytest.mark.parametrize("device", ["cuda:99", "cpu", "nonsense", -1])
def test_unknown_device(device):
    with pytest.raises(ArgumentValueError, match="device="):
        GroupNorm(CHANNELS, num_groups=GROUPS, backend="cupy", device=device)
