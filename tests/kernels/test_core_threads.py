"""Results of the compiled core do not depend on threads, to the bit; large results are right."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from groupnorm.backends.kernels.variants import DTYPES
from tests.kernels.core import INPUT_GRADIENT, NORMALIZE, Call, check, needs_core
from tests.rows import host_dtype

core = needs_core()
each_layout = pytest.mark.parametrize("first", [True, False], ids=["first", "last"])

# Enough elements for seven threads: whole samples for each thread, samples that threads share, one
# position, whole samples of several chunks.
SIZES = [(80, 4, 3, 500), (3, 2, 4, 20001), (4000, 5, 24, 1), (9, 2, 16, 2500)]
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
        # Another size for each activation, and for each mask of an activation.
        number = (turn + turn // len(ACTIVATIONS) + shift) % len(SIZES)
        kind = PARAMETERS[(turn // 3 + shift) % 3]
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


@pytest.mark.parametrize("stage", [NORMALIZE, INPUT_GRADIENT], ids=["y", "dx"])
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize(("sizes", "first"), LARGE, ids=str)
def test_results_past_the_cache(sizes, first, result, stage):
    """They are streamed to memory, at any address: equal to those of small calls, to the bit."""
    samples, groups, size, positions = sizes
    channels, elements = groups * size, samples * groups * size * positions
    assert elements * 2 >= PAST_CACHE
    rng = np.random.default_rng(0)
    x_dtype = result if stage == INPUT_GRADIENT else DTYPES[(DTYPES.index(result) + first) % 3]
    x, dy = (np.resize(drawn(rng, x_dtype), elements) for _ in range(2))
    scale, bias = rng.normal(size=(2, channels)).astype(np.float32)
    plans = x_dtype, result, stage
    statistics = np.concatenate(
        [rng.normal(size=(1, samples, groups)), rng.uniform(0.5, 2, (2, samples, groups))]
    )
    means = rng.normal(size=(2, samples, groups))
    item = 4 if result == "float32" else 2
    begin = 64 + 3 * item
    memory = np.full(elements * item + 192, 0xAB, np.uint8)
    begin += -memory.ctypes.data % 64
    y = memory[begin : begin + elements * item]
    one_stage(plans, sizes, first, x, scale, bias, statistics, y, dy, means, threads=2)
    # A channel of a sample, or rows of it.
    width, step = (1, 500_001) if first else (channels, max(1, 500_001 // channels))
    for sample, channel in np.ndindex(samples, channels if first else 1):
        own = slice(channel, channel + 1) if first else slice(None)
        group = slice(channel // size, channel // size + 1) if first else slice(None)
        start = (sample * channels + channel) * positions
        for at in range(0, positions, step):
            count = min(step, positions - at)
            part = slice(start + at * width, start + (at + count) * width)
            want = np.empty((part.stop - part.start) * item, np.uint8)
            one_stage(
                plans, (1, 1, 1, count) if first else (1, groups, size, count), first, x[part],
                scale[own], bias[own], statistics[:, sample, group], want, dy[part],
                means[:, sample, group],
            )  # fmt: skip
            assert np.array_equal(y[part.start * item : part.stop * item], want), part
    assert (memory[:begin] == 0xAB).all()
    assert (memory[begin + len(y) :] == 0xAB).all()


def drawn(rng, dtype):
    a = rng.normal(size=1_000_003).astype(host_dtype(dtype))
    return a.view(np.uint16) if a.dtype.kind == "V" else a


def one_stage(plans, sizes, first, x, scale, bias, statistics, y, dy, means, threads=1):
    x_dtype, result, stage = plans
    dtypes = DTYPES.index(x_dtype), DTYPES.index(result)
    statistics, means = map(np.ascontiguousarray, (statistics, means))
    core.Plan(*sizes, first, *dtypes, 2, 1e-6, False, False).stage(
        stage, x, scale, bias, None, statistics, y, dy, means, threads
    )


def test_a_whole_call_past_the_cache():
    """Statistics first, and the result while x is in the cache."""
    for first in (True, False):
        call = Call((3, 2, 3, 500_009), first=first)
        y = call.forward(3)
        assert y.nbytes >= PAST_CACHE
        x = call.x.reshape(3, 2, -1).astype(np.float64)
        deviation = x - x.mean(2, keepdims=True)
        xhat = deviation / np.sqrt((deviation**2).mean(2, keepdims=True) + call.epsilon)
        scale, bias = call.parameters()
        check(y, xhat.reshape(y.shape) * scale + bias, "float32")
