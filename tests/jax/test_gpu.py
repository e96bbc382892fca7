"""JAX programs for GPUs: what they call, lowered and compiled without one; values with one.

Values without a GPU are in tests/kernels/test_gpu_interpreted.py.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax as jax_itself
import numpy as np
import pytest

from groupnorm import available_backends, group_norm, group_norm_vjp
from groupnorm.adapter import Unsupported
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.testing import oracle
from tests import ROOT
from tests.rows import CONTRACT, GRADIENT, ROWS, assert_close, assert_gradient

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled"
)
pytest.importorskip("triton", reason="the kernels for GPUs need triton")
pytest.importorskip(
    "groupnorm.backends.kernels.cpu._core",
    reason="without kernels for CPUs calls there are not of the kernels",
)

PTX, JAX_TRITON = "__gpu$xla.gpu.ptx", "triton_kernel_call"
KEYWORDS = {"num_groups": 8, "activation": "silu", "implementation": "fused"}
SHAPES = {"one kernel": (2, 9, 7, 32), "tiles": (2, 200, 100, 32)}
# Where `nox -s tests` installs JAX's plugin for CUDA: beside the other packages it would be loaded
# into every process.
PLUGIN = os.environ.get("GROUPNORM_CUDA_PLUGIN", "")


@pytest.fixture
def jax(monkeypatch):
    """As in a process with one device, which conftest makes four of."""
    monkeypatch.setattr(jax_itself, "device_count", lambda: 1)
    jax_itself.clear_caches()  # of lowerings by another launcher
    return jax_itself


@pytest.fixture
def jax_gpu(jax):
    return importlib.import_module("groupnorm.backends.jax.gpu")


def launching(jax_gpu, launcher):
    """Emit calls for a GPU that need not be here."""
    return mock.patch.multiple(
        jax_gpu, chosen_launcher=lambda: launcher, compute_capability=lambda: 90
    )


def forward(*arrays):
    return group_norm(*arrays, **KEYWORDS)


def lowered(jax, function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def drawn(jax, name):
    shape = SHAPES[name]
    parameter = jax.ShapeDtypeStruct(shape[-1:], np.float32)
    return jax.ShapeDtypeStruct(shape, jax.numpy.bfloat16), parameter, parameter


def steps(name):
    """Return the steps of the program that JAX is to make, forward and backward."""
    samples, *positions, channels = SHAPES[name]
    form = gpu.GroupedShape(samples, 8, channels // 8, int(np.prod(positions)), False, 2)
    asked = gpu.KernelOptions(1e-6, "silu", None, True, True)
    return gpu.forward(form, asked).launches, gpu.backward(form, asked).launches


@pytest.mark.parametrize("name", SHAPES)
def test_lowered_to_calls_of_ptx(jax, jax_gpu, name):
    arrays = drawn(jax, name)
    there, back = steps(name)

    def both(dy, *arrays):
        y, pull = jax.vjp(forward, *arrays)
        return y, pull(dy)

    with launching(jax_gpu, jax_gpu._by_ptx):
        text = lowered(jax, forward, *arrays)
        dy = jax.ShapeDtypeStruct(arrays[0].shape, np.float32)
        text_of_both = lowered(jax, both, dy, *arrays)
    assert text.count(f"@{PTX}") == len(there)
    assert text_of_both.count(f"@{PTX}") == len(there) + len(back)
    for step in there:
        assert f"grid_x = {step.grid[0]} : i32" in text
        assert f"block_x = {32 * step.warps} : i32" in text
    assert 'kernel_type = "ptx"' in text
    assert ".target sm_90" in text


def test_parameters_of_each_sample_are_for_the_same_kernels(jax, jax_gpu, monkeypatch):
    """Also where the default backend is a GPU."""
    x, scale, bias = drawn(jax, "tiles")
    rows = [jax.ShapeDtypeStruct((x.shape[0], *p.shape), p.dtype) for p in (scale, bias)]
    kernels = importlib.import_module("groupnorm.backends.jax.kernels")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "_why_no_kernels", lambda: None)
    with launching(jax_gpu, jax_gpu._by_ptx):
        text = lowered(jax, forward, x, *rows)
    there, _ = steps("tiles")
    assert text.count(f"@{PTX}") == len(there)


def test_exported_programs_hold_no_kernel(jax, jax_gpu):
    arrays = [jax.ShapeDtypeStruct((2, 30, 32), np.float32)]
    with launching(jax_gpu, jax_gpu._by_ptx):
        exported = jax.export.export(jax.jit(forward), platforms=["cuda", "cpu"])(*arrays)
    assert PTX not in exported.mlir_module()


def test_without_a_launcher_programs_for_gpus_are_portable(jax, jax_gpu):
    """As where the default is the CPU and a program is lowered for a GPU all the same."""
    text = lowered(jax, forward, *drawn(jax, "one kernel"))
    assert PTX not in text


def test_what_fails_is_told(jax, jax_gpu, monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax_gpu, "compute_capability", lambda: 90)
    jax_gpu.chosen_launcher.cache_clear()
    found = jax_gpu.chosen_launcher()  # there is no GPU: XLA refuses
    jax_gpu.chosen_launcher.cache_clear()
    if ROWS["jax:gpu"].why_absent is None:
        pytest.skip("there is a GPU: nothing fails")
    assert isinstance(found, Unsupported)
    assert "XLA's PTX call: " in found.reason
    assert "jax-triton: " in found.reason
    assert "cannot be launched" in caplog.text


@pytest.mark.parametrize("launcher", ["ptx", "jax-triton"])
def test_compiled_for_a_gpu_that_is_not_here(launcher):
    if not PLUGIN or not Path(PLUGIN, "jax_plugins").exists():
        pytest.skip("JAX's plugin for CUDA is not installed at GROUPNORM_CUDA_PLUGIN")
    program = ROOT / "tests" / "programs" / "compile_jax_for_gpu.py"
    environment = {**os.environ, "PYTHONPATH": PLUGIN, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, program, launcher], capture_output=True, text=True, timeout=300,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    target = {"ptx": PTX, "jax-triton": JAX_TRITON}[launcher]
    counts = {name: calls.count(target) for name, calls in json.loads(done.stdout).items()}
    # Nothing else is called, and of forward what backward needs: not the result of the tiles.
    assert all(set(calls) == {target} for calls in json.loads(done.stdout).values())
    assert counts == {
        "forward, one kernel": 1, "backward, one kernel": 3,
        "forward, tiles": 3, "backward, tiles": 6,
    }  # fmt: skip


# With a GPU ---------------------------------------------------------------------------------------


def on_gpu(function):
    """Mark a test that computes on a GPU."""
    absent = ROWS["jax:gpu"].why_absent is not None
    return pytest.mark.gpu(pytest.mark.skipif(absent, reason="no GPU JAX can use")(function))


@on_gpu
def test_fused_is_what_is_taken():
    [info] = [info for info in available_backends() if info.name == "jax"]
    [device] = [name for name in info.devices if name.startswith(("gpu", "cuda"))][:1]
    assert info.implementations[device][0] == "fused"


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("name", SHAPES)
def test_values_gradients_and_the_same_bits_again(name, axis, dtype, rng):
    jnp = jax_itself.numpy
    shape = SHAPES[name] if axis == -1 else tuple(np.roll(SHAPES[name], (0, 1))[[0, 2, 3, 1]])
    shape = (shape[0], 32, *SHAPES[name][1:3]) if axis == 1 else shape
    x, dy = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    scale, bias = jnp.asarray(rng.normal(size=(2, 32)), "float32")
    keywords = {"num_groups": 8, "feature_axis": axis}
    runs = []
    for _ in range(2):
        y, pullback = group_norm_vjp(x, scale, bias, implementation="fused", **keywords)
        runs.append((y, *pullback(dy.astype(y.dtype))))
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))
    given = [np.asarray(a, np.float64) for a in (x, scale, bias, dy)]
    want = oracle.group_norm(*given[:3], **keywords)
    assert_close(np.asarray(runs[0][0]), want, tolerance=CONTRACT)
    reference = oracle.group_norm_gradients(given[0], given[3], *given[1:3], **keywords)
    for ours, true in zip(runs[0][1:], reference, strict=True):
        rounded = 2.0**-8 if ours.dtype == "bfloat16" else GRADIENT
        assert_gradient(np.asarray(ours, np.float64), true, rtol=rounded)
