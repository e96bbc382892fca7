"""Large pages are requested from the system for large results, as NumPy does."""

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
from tests.kernels.core import needs_core

needs_core()  # only the kernels request large pages
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the system call exists only on Linux"
)

SHAPE = (2, 64, 128, 128)  # 8 MiB


def flags(address: int) -> list[str]:
    """Return the Linux kernel's flags for the memory at an address; "hg" means large pages."""
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
def test_pytorch_results_use_large_pages(rng):
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
def test_jax_results_use_large_pages(rng, monkeypatch):
    jax = importlib.import_module("jax")
    if not can_tell() or jax.default_backend() != "cpu":
        pytest.skip("this system has no large pages")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = rng.normal(size=SHAPE).astype(np.float32)
    y = jax.jit(lambda x: group_norm(x, feature_axis=1, implementation="fused"))(x)
    y.block_until_ready()  # large pages are requested when the program runs, which is asynchronous
    assert "hg" in flags(y.unsafe_buffer_pointer() + y.nbytes // 2)


PROGRAM = """
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
def test_numpys_environment_variable_in_jax():
    """JAX programs request pages from compiled code, which does not read environment variables."""
    if not can_tell():
        pytest.skip("this system has no large pages")
    flagged = []
    for value in ("1", "0"):
        given = {"NUMPY_MADVISE_HUGEPAGE": value, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240,
            check=False, env=os.environ | given, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        flagged.append(done.stdout.split()[-1])
    assert flagged == ["True", "False"]


DIRECT = """
import mmap
import numpy as np
from tests.kernels.core import needs_core
from tests.kernels.test_huge_pages import flags
core = needs_core()
for rows in (1 << 12, 1 << 15):  # 1 MiB, 8 MiB
    memory = mmap.mmap(-1, 256 * rows, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    x = np.ones(64 * rows, np.float32)
    core.Plan(1, 8, 8, rows, False, 0, 0, 0, 1e-6, False, False).forward(
        x, None, None, None, memory, False, 2
    )
    assert not np.frombuffer(memory, np.float32).any()
    print("hg" in flags(np.frombuffer(memory, np.uint8).ctypes.data + 128 * rows))
"""


@pytest.mark.parametrize(("value", "want"), [("1", True), ("0", False), (None, True)])
def test_numpys_environment_variable(value, want):
    """The core asks for large pages if a result is large, unless NumPy's variable forbids it."""
    if not can_tell():
        pytest.skip("this system has no large pages")
    environment = {k: v for k, v in os.environ.items() if k != "NUMPY_MADVISE_HUGEPAGE"}
    given = {} if value is None else {"NUMPY_MADVISE_HUGEPAGE": value}
    done = subprocess.run(
        [sys.executable, "-c", DIRECT], capture_output=True, text=True, timeout=240, check=False,
        env=environment | given, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", str(want)]
