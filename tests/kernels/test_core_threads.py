"""Results of the compiled core do not depend on threads, to the bit; large results are right."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from groupnorm.backends.kernels.variants import DTYPES
from tests.kernels.core import NORMALIZE, Call, needs_core
from tests.rows import host_dtype

core = needs_core()
each_layout = pytest.mark.parametrize("first", [True, False], ids=["first", "last"])

# Enough elements for seven threads: whole samples for each thread, samples that threads share, one
# position.
SIZES = [(80, 4, 3, 500), (3, 2, 4, 20001), (4000, 5, 24, 1)]
MASKS = (None, "one", "each")
ACTIVATIONS = (None, "relu", "silu", "gelu")
PARAMETERS = ("each", "rows", "none")


def bits(call, threads):
    """Return all results of a call, forward and backward, as bytes."""
    y = call.forward(threads)
    return [a.tobytes() for a in (y, call.statistics, *call.backward(threads))]


def variants(x, y, first):
    """Each mask with each activation, on rotating sizes and kinds of parameters."""
    calls = [Call(sizes, first=first, x=x, y=y, masked="each", rows=True) for sizes in SIZES]
    drawn = [(call.mask, call.scale, call.bias) for call in calls]
    shift = DTYPES.index(x) + 2 * DTYPES.index(y) + first
    for turn, (mask, activation) in enumerate(itertools.product(MASKS, ACTIVATIONS)):
        number, kind = (turn + shift) % 3, PARAMETERS[(turn // 3 + shift) % 3]
        call, (masks, scale, bias) = calls[number], drawn[number]
        call.mask = {None: None, "one": masks[:1], "each": masks}[mask]
        call.rows, call.activation = kind == "rows", activation
        call.scale, call.bias = {
            "each": (scale[:1], bias[:1]), "rows": (scale, bias), "none": (None, None),
        }[kind]  # fmt: skip
        call.plan = call.planned()
        yield call


@pytest.mark.parametrize("y", DTYPES)
@pytest.mark.parametrize("x", DTYPES)
@each_layout
def test_bits_do_not_depend_on_the_number_of_threads(first, x, y):
    for call in variants(x, y, first):
        want = bits(call, 1)
        for threads in (2, 3, 7):
            assert bits(call, threads) == want, (call.sizes, call.activation, threads)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@each_layout
def test_calls_of_several_python_threads(first, sizes):
    """They share the threads of the core, and each has results of its own."""
    calls = [Call(sizes, first=first, seed=seed, activation="silu") for seed in range(3)]
    want = [bits(call, 1) for call in calls]

    def is_right(turn):
        given = calls[turn % 3]
        call = object.__new__(Call)  # the results are kept in it
        call.__dict__.update(given.__dict__)
        return bits(call, 1 + turn % 7) == want[turn % 3]

    with ThreadPoolExecutor(6) as executor:
        assert all(executor.map(is_right, range(24)))


def test_the_number_of_threads_is_a_limit():
    """It may be of any size, and one thread is the least."""
    call = Call((1, 1, 1, 200_000))
    want = bits(call, 1)
    for threads in (0, -5, 1000, 2**31 - 1, 2**40):
        assert bits(call, threads) == want


# Results past the cache ---------------------------------------------------------------------------

PAST_CACHE = 1 << 25  # bytes of y, as in call.hpp
LARGE = [
    ((2, 2, 1, 4_194_307), True), ((3, 3, 67, 27_901), True), ((3, 3, 67, 27_901), False),
    ((16, 257, 4081, 1), False), ((900, 3, 7, 999), False),
]  # fmt: skip


@pytest.mark.parametrize("y", DTYPES)
@pytest.mark.parametrize(("sizes", "first"), LARGE, ids=str)
def test_results_past_the_cache(sizes, first, y):
    """They are streamed to memory, at any address: equal to those of small calls, to the bit."""
    samples, groups, size, positions = sizes
    channels = groups * size
    shape = (samples, channels, positions) if first else (samples, positions, channels)
    assert np.prod(shape) * 2 >= PAST_CACHE
    rng = np.random.default_rng(0)
    x = np.resize(rng.normal(size=1_000_003).astype(np.float32), shape)
    scale, bias = rng.normal(size=(2, channels)).astype(np.float32)
    x_dtype = DTYPES[(DTYPES.index(y) + first) % 3]
    if x_dtype != "float32":
        x = np.resize(x.reshape(-1)[:1_000_003].astype(host_dtype(x_dtype)).view(np.uint16), shape)
    dtypes = DTYPES.index(x_dtype), DTYPES.index(y)
    item = 4 if y == "float32" else 2
    plan = core.Plan(*sizes, first, *dtypes, 2, 1e-6, False, False)
    bytes_ = x.size * item
    for offset in (3 * item, 1):
        memory = np.full(bytes_ + 128, 0xAB, np.uint8)
        begin = -memory.ctypes.data % 64 + offset
        result = memory[begin : begin + bytes_]
        saved = plan.forward(x, scale, bias, None, result, True, 2)
        statistics = np.frombuffer(saved).reshape(3, samples, groups)
        for part, want in small_calls(sizes, first, dtypes, x, scale, bias, statistics):
            got = result[part.start * item : part.stop * item]
            assert np.array_equal(got, want), (offset, part)
        assert (memory[:begin] == 0xAB).all()
        assert (memory[begin + bytes_ :] == 0xAB).all()


def small_calls(sizes, first, dtypes, x, scale, bias, statistics):
    """Yield the ranges of elements that small calls normalize, and their results, as bytes."""
    samples, groups, size, positions = sizes
    channels, x = groups * size, x.reshape(-1)
    item = 2 if dtypes[1] else 4
    step = 500_001 if first else max(1, 500_001 // channels)
    for sample in range(samples):
        for channel in range(channels if first else 1):
            own = slice(channel, channel + 1) if first else slice(None)
            group = slice(channel // size, channel // size + 1) if first else slice(None)
            begin = (sample * channels + channel) * positions
            for at in range(0, positions, step):
                count = min(step, positions - at)
                shape = (1, 1, 1, count) if first else (1, groups, size, count)
                plan = core.Plan(*shape, first, *dtypes, 2, 1e-6, False, False)
                width = 1 if first else channels
                part = slice(begin + at * width, begin + (at + count) * width)
                y = np.empty((part.stop - part.start) * item, np.uint8)
                plan.stage(
                    NORMALIZE, x[part], scale[own], bias[own], None,
                    np.ascontiguousarray(statistics[:, sample, group]), y, None, None, 1,
                )  # fmt: skip
                yield part, y
