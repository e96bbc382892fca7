"""Memory of the CPU kernels: scratch is a small fraction of x; caches keep nothing of a call."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from groupnorm import group_norm, group_norm_vjp, num_threads
from groupnorm.backends.kernels.cpu import launch
from tests import ROOT
from tests.kernels.core import needs_core, without_sanitizers

core = needs_core()

# Samples, groups, channels of a group, positions: x has 16 MiB or more in float32.
SHAPES = {
    "many samples of one position": (200_000, 8, 4, 1),
    "a wide layer": (1024, 32, 128, 1),
    "many samples of three positions": (50_000, 8, 4, 3),
    "one channel": (800, 1, 1, 8000),
    "groups of one channel": (64, 64, 1, 4096),
    "photographs": (8, 32, 8, 3136),
    "few photographs": (2, 32, 2, 200_000),
    "one volume": (1, 4, 2, 1_000_000),
    "a long signal": (1, 1, 1, 8_000_000),
    "many channels": (2, 256, 16, 1024),
}


@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [0, 1], ids=["float32", "float16"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("rows", [False, True], ids=["one row", "a row for each sample"])
@pytest.mark.parametrize("name", SHAPES)
def test_scratch_is_a_small_fraction(name, rows, first, dtype, backward, masked, threads):
    """At most 2 % of x, 256 bytes per channel, and 64 KiB and 64 bytes per channel per thread."""
    sizes = samples, groups, size, positions = SHAPES[name]
    plan = core.Plan(*sizes, first, dtype, dtype, 0, 1e-6, False, rows)
    nbytes = samples * groups * size * positions * (2 if dtype else 4)
    limit = 0.02 * nbytes + 256 * groups * size + (65536 + 64 * groups * size) * threads
    assert plan.scratch_bytes(backward, masked, threads) <= limit


@pytest.mark.parametrize("shape", [(20000, 64), (5000, 3, 64), (8, 3136, 64)])
def test_peak_memory_of_a_call(shape, monkeypatch):
    """Python allocates the result, the statistics and little else."""
    monkeypatch.setattr(num_threads, "_set", 2)
    x = np.ones(shape, np.float32)
    statistics = 24 * shape[0] * 32
    limit = statistics + (1 << 14)

    def peak(call):
        call()  # plans
        tracemalloc.start()
        kept = call()
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return kept, highest

    _, highest = peak(lambda: group_norm(x))
    assert highest <= x.nbytes + (1 << 14)
    _, pullback = group_norm_vjp(x)
    _, highest = peak(lambda: group_norm_vjp(x))
    assert highest <= x.nbytes + limit
    _, highest = peak(lambda: pullback(x))
    assert highest <= x.nbytes + (1 << 14)


def test_batches_of_many_sizes_keep_nothing():
    """Each size has an entry of a few kilobytes in the caches, however large the arrays are."""
    x = np.ones((4200, 64), np.float32)

    def call(n):
        _, pullback = group_norm_vjp(x[:n])
        pullback(x[:n])

    call(4000)
    tracemalloc.start()
    for n in range(4001, 4041):
        call(n)
    kept = tracemalloc.get_traced_memory()[0] / 40
    tracemalloc.stop()
    assert kept <= 20_000  # an array of statistics alone takes 3 MB
    assert launch.planned.cache_info().maxsize * kept <= 1 << 25


MANY_CALLS = """
import resource
import numpy as np
from groupnorm import group_norm, group_norm_vjp, set_num_threads
set_num_threads(3)
rng = np.random.default_rng(0)
shapes = (40, 64, 65), (2, 30000, 8), (9000, 32)
xs = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
mask = rng.random((40, 64, 1)) < 0.5

def calls(number):
    for _ in range(number):
        for x in xs:
            group_norm(x, num_groups=1, mask=mask if x.shape[0] == 40 else None)
            y, pullback = group_norm_vjp(x, num_groups=1)
            pullback(x)
        try:
            group_norm(xs[0], num_groups=7)
        except ValueError:
            pass

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

calls(20)
before = resident()
calls(200)
print(resident() - before)
"""


@without_sanitizers("asan", "tsan")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_calls_keep_no_memory():
    done = subprocess.run(
        [sys.executable, "-c", MANY_CALLS], capture_output=True, text=True, timeout=240,
        check=False, cwd=ROOT, env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A leak of the smallest array of one of the calls would be 1,200 times 256 bytes.
    assert int(done.stdout) < 1 << 18
