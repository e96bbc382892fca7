"""Memory of the CPU kernels: scratch is a small fraction of x; caches keep nothing of a call."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from groupnorm import group_norm, group_norm_vjp, num_threads
from groupnorm.backends.kernels.cpu import call_frame as frames
from groupnorm.backends.kernels.cpu import launch
from groupnorm.backends.kernels.grouped_shape import GroupedShape

pytest.importorskip("numba", reason="the kernels need numba, which is not installed here")

SHAPES = {
    "samples of one position": (20000, 32, 2, 1, False),
    "samples of three positions": (5000, 8, 8, 3, False),
    "samples of three positions, first": (5000, 8, 8, 3, True),
    "a wide layer": (1024, 32, 128, 1, False),
    "one channel": (40, 1, 1, 5000, False),
    "photographs": (8, 32, 2, 3136, False),
    "photographs, first": (8, 32, 2, 3136, True),
    "one volume": (1, 4, 2, 500_000, False),
}


@pytest.mark.parametrize("helpers", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_scratch_is_a_small_fraction(name, kernel, masked, helpers):
    """As documented: x / 8, and 64 bytes per channel and 64 KiB for each thread."""
    shape = GroupedShape(*SHAPES[name])
    plan = frames.kernel_shape(shape)
    kernel = f"channels_{'first' if plan.channels_first else 'last'}_{kernel}"
    mask = shape.samples * shape.positions if masked else 0
    made = frames.template(kernel, plan, mask, 1e-6, helpers, keep=kernel.endswith("backward"))
    saved = 0 if kernel.endswith("backward") else made.saved
    words = made.head.size + made.counters + made.scratch + made.sums + saved
    limit = 4 * shape.elements / 8 + (helpers + 1) * (64 * shape.channels + (1 << 16))
    assert 8 * words <= limit


@pytest.mark.parametrize("shape", [(20000, 64), (5000, 3, 64), (8, 3136, 64)])
def test_peak_memory_of_a_call(shape, monkeypatch):
    monkeypatch.setattr(num_threads, "_set", 2)
    x = np.ones(shape, np.float32)
    limit = x.nbytes / 8 + 2 * (64 * 64 + (1 << 16))

    def peak(call):
        call()  # compiles, or loads
        tracemalloc.start()
        kept = call()
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return kept, highest

    _, highest = peak(lambda: group_norm(x))
    assert highest <= x.nbytes + limit
    _, pullback = group_norm_vjp(x)
    _, highest = peak(lambda: pullback(x))
    assert highest <= x.nbytes + limit


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
