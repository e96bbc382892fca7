"""Wrong arguments to the compiled core raise, and so does a lack of memory; neither crashes."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import numpy as np
import pytest

from tests import ROOT
from tests.kernels.core import (
    INPUT_GRADIENT,
    MEASURE,
    NORMALIZE,
    SUM,
    needs_core,
    without_sanitizers,
)

core = needs_core()

SIZES = (3, 2, 4, 50)  # 3 samples of 8 channels, 1200 elements
PLAN = (*SIZES, False, 0, 0, 0, 1e-6, False, False)


def f4(n):
    return np.ones(n, np.float32)


def f8(n):
    return np.ones(n, np.float64)


def read_only(a):
    a.flags.writeable = False
    return a


# The arguments of each method.
FORWARD = {"x": f4(1200), "scale": f4(8), "bias": f4(8), "mask": np.ones(150, np.uint8),
           "y": f4(1200), "keep": True, "threads": 2}  # fmt: skip
BACKWARD = {"x": f4(1200), "scale": f4(8), "bias": f4(8), "mask": np.ones(150, np.uint8),
            "saved": f8(18), "dy": f4(1200), "dy_dtype": 0, "dx": f4(1200), "dscale": f4(8),
            "dbias": f4(8), "batches": 1, "threads": 2}  # fmt: skip
STAGE = {"stage": 0, "x": f4(1200), "scale": f4(8), "bias": f4(8),
         "mask": np.ones(50, np.uint8), "statistics": f8(18), "y": f4(1200), "dy": f4(1200),
         "sums": f8(48), "threads": 1}  # fmt: skip
CALLS = {
    "forward": FORWARD,
    "backward": BACKWARD,
    **{f"stage {n}": STAGE | {"stage": n} for n in (MEASURE, NORMALIZE, SUM, INPUT_GRADIENT)},
}
OPTIONAL = {"scale", "bias", "mask"}
WRITTEN = {"y", "dx", "dscale", "dbias"}
# What a stage does not use may be left out.
USED = {
    "stage 1": {"x", "statistics"},
    "stage 2": {"x", "statistics", "y"},
    "stage 4": {"x", "statistics", "dy", "sums"},
    "stage 8": {"x", "statistics", "y", "dy", "sums"},
}
ARRAYS = [
    (method, name)
    for method, given in CALLS.items()
    for name, value in given.items()
    if isinstance(value, np.ndarray)
]


def call(method, changed=None, plan=PLAN):
    given = CALLS[method] | (changed or {})
    return getattr(core.Plan(*plan), method.partition(" ")[0])(*given.values())


@pytest.mark.parametrize("method", CALLS)
def test_right_arguments(method):
    """The control."""
    call(method)
    call(method, dict.fromkeys(OPTIONAL))


@pytest.mark.parametrize(("method", "name"), ARRAYS)
def test_short_buffers(method, name):
    least = 50 if name == "mask" else CALLS[method][name].size
    if name == "sums" and method != f"stage {SUM}":
        least = 12  # means over groups
    short = CALLS[method][name][: least - 1]
    with pytest.raises(ValueError, match=rf"{name} has {short.nbytes} bytes, and the plan needs"):
        call(method, {name: short})
    with pytest.raises(ValueError, match=name):
        call(method, {name: short[:0]})


@pytest.mark.parametrize(("method", "name"), ARRAYS)
@pytest.mark.parametrize("wrong", ["text", 1.5, [1.0], object(), np.ones((1200, 2), "f4")[:, 0]])
def test_what_is_no_buffer(method, name, wrong):
    with pytest.raises((TypeError, BufferError, ValueError)):
        call(method, {name: wrong})


@pytest.mark.parametrize(("method", "name"), ARRAYS)
def test_read_only_results(method, name):
    array = read_only(CALLS[method][name].copy())
    written = name in WRITTEN or (method, name) in (("stage 1", "statistics"), ("stage 4", "sums"))
    if not written:
        call(method, {name: array})
        return
    with pytest.raises((ValueError, BufferError)):
        call(method, {name: array})
    with pytest.raises((TypeError, BufferError)):
        call(method, {name: array.tobytes()})


@pytest.mark.parametrize(("method", "name"), ARRAYS)
@pytest.mark.parametrize("nothing", [None, 0], ids=["None", "address 0"])
def test_missing_arrays(method, name, nothing):
    if name in OPTIONAL or (method in USED and name not in USED[method]):
        call(method, {name: nothing})
        return
    with pytest.raises(ValueError, match=f"{name} is missing"):
        call(method, {name: nothing})


@pytest.mark.parametrize("method", CALLS)
def test_numbers_of_arguments(method):
    given, function = list(CALLS[method].values()), method.partition(" ")[0]
    for wrong in ([], given[:-1], [*given, 1]):
        message = f"{function} takes {len(given)} arguments, not {len(wrong)}"
        with pytest.raises(TypeError, match=message):
            getattr(core.Plan(*PLAN), function)(*wrong)


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("wrong", ["2", None, 1.5])
def test_numbers_of_threads(method, wrong):
    with pytest.raises((TypeError, OverflowError)):
        call(method, {"threads": wrong})


@pytest.mark.parametrize("wrong", [0, 2, -1, 4, 2**40, 2**80, "1", None])
def test_batches(wrong):
    with pytest.raises((ValueError, TypeError, OverflowError)):
        call("backward", {"batches": wrong})


@pytest.mark.parametrize("wrong", [1, 2, 3, -1, 2**33, 2**80, None])
def test_dtypes_of_dy(wrong):
    """x's, or float32: 1 and 2 exist, but not for x of float32."""
    with pytest.raises((ValueError, TypeError, OverflowError)):
        call("backward", {"dy_dtype": wrong})


@pytest.mark.parametrize("wrong", [0, 3, 5, 12, -1, 16, 2**33, 2**80, None, "1"])
def test_stages(wrong):
    """Both stages of a direction are `forward` and `backward`."""
    with pytest.raises((ValueError, TypeError, OverflowError)):
        call("stage 1", {"stage": wrong})


@pytest.mark.parametrize("position", range(11))
@pytest.mark.parametrize("wrong", [0, -1, 2**31, 2**40, 2**62, 2**80, "1", None, 1.5, np.nan])
def test_plans(position, wrong):
    """Each argument in turn; a plan that is made can be called, or says what it lacks."""
    given = list(PLAN)
    given[position] = wrong
    try:
        plan = core.Plan(*given)
    except (ValueError, TypeError, OverflowError):
        return
    assert position > 3 or wrong in (2**31, 2**40)
    for method in CALLS:
        with contextlib.suppress(ValueError):  # buffers may be too short for the plan
            getattr(plan, method.partition(" ")[0])(*CALLS[method].values())


@pytest.mark.parametrize("sizes", [(2**31, 2**31, 2, 1), (2**21,) * 4, (2**61, 1, 1, 1),
                                   (1, 1, 1, 2**60), (3, 2**30, 2**30, 2**10)])  # fmt: skip
def test_products_of_sizes_do_not_overflow(sizes):
    with pytest.raises((ValueError, OverflowError)):
        core.Plan(*sizes, False, 0, 0, 0, 1e-6, False, False)


def test_wrong_numbers_of_plan_arguments():
    for wrong in ((), PLAN[:-1], (*PLAN, 1)):
        with pytest.raises(TypeError):
            core.Plan(*wrong)
    with pytest.raises(TypeError):
        core.Plan(*PLAN, threads=1)
    with pytest.raises(TypeError):
        type("Own", (core.Plan,), {})
    with pytest.raises(AttributeError):
        core.Plan(*PLAN).more = 1


@pytest.mark.parametrize("wrong", [(), (True,), (True, False, 1, 1), (True, False, "1"),
                                   (True, False, None)])  # fmt: skip
def test_scratch_bytes(wrong):
    plan = core.Plan(*PLAN)
    with pytest.raises((TypeError, OverflowError)):
        plan.scratch_bytes(*wrong)


@pytest.mark.parametrize("threads", [0, -1, -(2**31), 2**31 - 1, 2**40, 2**80])
def test_scratch_bytes_of_any_number_of_threads(threads):
    """One is the least; large numbers are bounded."""
    plan = core.Plan(*PLAN)
    found, least = (plan.scratch_bytes(True, False, n) for n in (threads, 1))
    assert found == least if threads < 1 else least < found < 1 << 24


def test_use_openmp():
    for wrong in ("text", None, 1.5):
        with pytest.raises(TypeError):
            core.use_openmp(wrong)
    with pytest.raises(OverflowError):
        core.use_openmp(2**80)


def test_results_keep_no_reference():
    x, y = f4(1200), f4(1200)
    before = sys.getrefcount(x), sys.getrefcount(y)
    plan = core.Plan(*PLAN)
    for _ in range(5):
        plan.forward(x, None, None, None, y, True, 1)
        with pytest.raises(ValueError, match="dy"):
            plan.backward(x, None, None, None, f8(18), f4(1), 0, y, f4(8), f4(8), 1, 1)
    assert (sys.getrefcount(x), sys.getrefcount(y)) == before
    memory = bytearray(4800)
    plan.forward(x, None, None, None, memory, True, 1)
    memory.extend(b"1")  # its buffer is not held any more


# Memory -------------------------------------------------------------------------------------------

NO_MEMORY = """
import resource
import numpy as np
from tests.kernels.core import needs_core
core = needs_core()
samples, channels = 4, 1 << 20
x, y = np.ones((2, samples, channels), np.float32)
parameters = np.ones((2, channels), np.float32)
plan = core.Plan(samples, channels, 1, 1, False, 0, 0, 0, 1e-6, False, False)
saved = plan.forward(x, None, None, None, y, True, 1)
want = plan.scratch_bytes(True, False, 1)
assert want > 1 << 26, want

def call():
    plan.backward(x, None, None, None, saved, x, 0, y, *parameters, 1, 1)

call()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
for more in (1 << 20, want // 2):
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
    y[...] = 7
    try:
        call()
    except MemoryError:
        assert y.min() == y.max() == 7  # nothing was written
        print("MemoryError")
try:
    plan.scratch_bytes(True, False, 1)
    print("bytes")
except MemoryError:
    print("MemoryError")
try:
    plan.forward(x, None, None, None, y, True, 1)
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
call()
"""


@without_sanitizers("asan", "tsan")
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, and reads /proc")
def test_a_lack_of_memory_raises():
    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, timeout=240,
        check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert lines[:2] == ["MemoryError"] * 2
    assert lines[3:] == ["MemoryError"]
    assert lines[2] in ("bytes", "MemoryError")
