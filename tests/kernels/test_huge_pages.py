"""Large results ask the system for large pages, as NumPy's do."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from groupnorm import group_norm
from tests import ROOT

pytest.importorskip("numba", reason="the kernels' results are meant")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")

SHAPE = (2, 64, 128, 128)  # 8 MiB


def flags(address: int) -> list[str]:
    """Return the kernel's flags for the memory at an address; "hg" is what was asked for."""
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            mine = int(found[1], 16) <= address < int(found[2], 16)
        elif mine and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no memory at {address:x}")


def can_tell() -> bool:
    settings = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return settings.exists() and Path("/proc/self/smaps").exists()


@pytest.mark.needs("torch")
def test_of_pytorch(rng):
    torch = importlib.import_module("torch")
    if not can_tell():
        pytest.skip("this system has no large pages")
    x = torch.from_numpy(rng.normal(size=SHAPE).astype(np.float32))
    y = group_norm(x, feature_axis=1)
    middle = y.data_ptr() + y.nbytes // 2
    assert "hg" in flags(middle)
    small = group_norm(x[:, :, :8].contiguous(), feature_axis=1)
    assert small.shape == (2, 64, 8, 128)


@pytest.mark.needs("jax")
def test_of_jax(rng, monkeypatch):
    jax = importlib.import_module("jax")
    if not can_tell() or jax.default_backend() != "cpu":
        pytest.skip("this system has no large pages")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = rng.normal(size=SHAPE).astype(np.float32)
    y = jax.jit(lambda x: group_norm(x, feature_axis=1, implementation="fused"))(x)
    y.block_until_ready()  # it is asked when the program runs, which is later than this
    assert "hg" in flags(y.unsafe_buffer_pointer() + y.nbytes // 2)


NOT_ASKED = """
import jax
import numpy as np
from groupnorm import group_norm
from tests.kernels.test_huge_pages import SHAPE, flags
x = np.ones(SHAPE, np.float32)
y = jax.jit(lambda x: group_norm(x, feature_axis=1, implementation="fused"))(x)
y.block_until_ready()
print("hg" in flags(y.unsafe_buffer_pointer() + y.nbytes // 2))
"""


@pytest.mark.needs("jax")
def test_the_variable_that_numpy_reads_in_jax():
    """Its programs ask in compiled code, which reads no variables."""
    if not can_tell():
        pytest.skip("this system has no large pages")
    told = []
    for value in ("1", "0"):
        given = {"NUMPY_MADVISE_HUGEPAGE": value, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", NOT_ASKED], capture_output=True, text=True, timeout=240,
            check=False, env=os.environ | given, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.split()[-1])
    assert told == ["True", "False"]


def test_the_variable_that_numpy_reads(monkeypatch):
    pages = importlib.import_module("groupnorm.backends.kernels.cpu.huge_pages")
    pages._system_call.cache_clear()
    monkeypatch.setenv("NUMPY_MADVISE_HUGEPAGE", "0")
    assert pages._system_call() is None
    monkeypatch.delenv("NUMPY_MADVISE_HUGEPAGE")
    pages._system_call.cache_clear()
    assert pages._system_call() is not None
    x = np.zeros(1 << 21, np.float32)
    pages.want_large_pages(x.ctypes.data, x.nbytes)
    assert not x.any()
