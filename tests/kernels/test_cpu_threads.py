"""Threads of the CPU kernels: their number and limits; interrupts, forks and exits under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest

import groupnorm
from groupnorm import num_threads
from groupnorm.backends.kernels.cpu import launch
from groupnorm.backends.kernels.cpu.availability import why_unavailable
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from tests.kernels.core import without_sanitizers


@pytest.fixture
def unset(monkeypatch):
    """Nothing set, no limits but the CPUs, of which there are 64, and no threadpoolctl."""
    for name in (num_threads.VARIABLE, *num_threads.LIMITS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(num_threads, "_set", None)
    monkeypatch.setattr(num_threads, "_cpus", lambda: 64)
    monkeypatch.setattr(num_threads, "_quota", lambda: None)
    monkeypatch.delitem(sys.modules, "threadpoolctl", raising=False)
    remembered = (num_threads._own_variable, num_threads._fixed_limits, num_threads._controller)
    for function in remembered:
        function.cache_clear()
    yield monkeypatch
    for function in remembered:
        function.cache_clear()


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({}, 64),
        ({"OMP_NUM_THREADS": "8"}, 8),
        ({"OMP_NUM_THREADS": "6,2"}, 6),
        ({"OMP_NUM_THREADS": "none"}, 64),
        ({"OMP_NUM_THREADS": "0"}, 64),
        ({"OMP_NUM_THREADS": "100"}, 64),
        ({"OMP_NUM_THREADS": "8", "GROUPNORM_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "1", "GROUPNORM_NUM_THREADS": "5"}, 5),
        ({"GROUPNORM_NUM_THREADS": ""}, 64),
    ],
)
def test_variables(variables, want, unset):
    for name, value in variables.items():
        unset.setenv(name, value)
    assert groupnorm.get_num_threads() == want


def test_a_variable_that_is_no_number_is_ignored_with_a_warning(unset, caplog):
    unset.setenv("GROUPNORM_NUM_THREADS", "all")
    assert groupnorm.get_num_threads() == groupnorm.get_num_threads() == 64
    assert [r.getMessage() for r in caplog.records] == [
        "groupnorm ignores GROUPNORM_NUM_THREADS='all': it must be a positive integer, such as 1."
    ]


def test_set_num_threads_comes_first(unset):
    unset.setenv("GROUPNORM_NUM_THREADS", "5")
    groupnorm.set_num_threads(np.int64(7))
    assert groupnorm.get_num_threads() == 7


def test_the_core_is_told_the_number(unset):
    """A small call has one thread in any case."""
    told = []

    class Plan:
        def __init__(self, *_):
            pass

        def forward(self, *arguments):
            told.append(arguments[-1])

        def backward(self, *arguments):
            told.append(arguments[-1])

    unset.setattr(launch, "core", lambda: types.SimpleNamespace(Plan=Plan))
    unset.setattr(launch, "why_unavailable", lambda: None)
    launch.planned.cache_clear()
    try:
        for shape in ((8, 100, 64), (2, 8)):
            x = np.ones(shape, np.float32)
            for number in (1, 3):
                groupnorm.set_num_threads(number)
                _, pullback = groupnorm.group_norm_vjp(x, num_groups=2)
                pullback(x)
    finally:
        launch.planned.cache_clear()
    assert told == [1, 1, 3, 3, 1, 1, 1, 1]


def test_none_unsets_the_number(unset):
    groupnorm.set_num_threads(7)
    groupnorm.set_num_threads(None)
    assert groupnorm.get_num_threads() == 64


@pytest.mark.parametrize("value", [0, -1])
def test_too_few_threads(value, unset):
    with pytest.raises(ArgumentValueError, match=rf"num_threads={value} .* at least 1"):
        groupnorm.set_num_threads(value)
    assert groupnorm.get_num_threads() == 64


@pytest.mark.parametrize("value", [True, 1.5, "2"])
def test_threads_that_are_no_number(value, unset):
    with pytest.raises(ArgumentTypeError, match=r"num_threads=.* integer"):
        groupnorm.set_num_threads(value)


def test_limits_of_threadpoolctl(unset):
    pool = pytest.importorskip("threadpoolctl")
    with pool.threadpool_limits(1):
        assert groupnorm.get_num_threads() == 1
    assert groupnorm.get_num_threads() >= 1


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        # The limit of an outer group, and a path that exists only outside the container.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/gone\n", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "3:memory:/m\n2:cpu,cpuacct:/c\n",
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_limits_of_containers(files, want, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(num_threads, "ROOT", tmp_path)
    assert num_threads._quota() == want


# Programs -----------------------------------------------------------------------------------------


def run(arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return done.stdout


needs_kernels = pytest.mark.skipif(
    why_unavailable() is not None, reason="the compiled core is not installed"
)
needs_signals = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="this system has no interval timers"
)
needs_forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@needs_kernels
@needs_signals
@pytest.mark.parametrize(
    "checks", [{}, {"MALLOC_PERTURB_": "165", "PYTHONMALLOC": "debug"}], ids=["", "perturbed"]
)
def test_interrupted_calls(checks):
    """GROUPNORM_INTERRUPTED_CALLS sets another number of calls, such as 200000."""
    assert "interrupted" in run(["-m", "tests.programs.interrupted_calls"], **checks)


INTERRUPT = """
import signal
import numpy as np
from tests.kernels.core import Call
call = Call((16, 8, 1, 65536), first=True)
want = call.forward(1).copy()
x, scale, bias, mask = call.inputs
y = call.empty("float32")

class Interrupted(Exception):
    pass

def interrupt(*_):
    raise Interrupted

signal.signal(signal.SIGALRM, interrupt)
found = 0
for turn in range(10):
    y[...] = 7
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        call.plan.forward(x, scale, bias, mask, y, False, 3)
        while True:
            pass
    except Interrupted:
        # The call was complete when the handler ran, if it had begun.
        assert np.array_equal(y, want) or (y == 7).all()
        found += np.array_equal(y, want)
assert found
"""


@needs_kernels
@needs_signals
def test_a_signal_is_handled_when_the_call_is_complete():
    run(["-c", INTERRUPT])


EXIT = """
import sys, threading, time
import numpy as np
import groupnorm
groupnorm.set_num_threads(3)
x = np.ones((64, 32, 64, 64), np.float32)
class Slow:
    def __del__(self):
        time.sleep(0.3)  # while it is destroyed with its module, calls of daemon threads end
slow = Slow()
running = threading.Semaphore(0)
def busy():
    while True:
        running.release()
        groupnorm.group_norm(x.copy(), feature_axis=1, activation="gelu")
for _ in range(3):
    threading.Thread(target=busy, daemon=True).start()
for _ in range(4):
    running.acquire()
{end}
"""


@needs_kernels
@without_sanitizers("asan")
@pytest.mark.parametrize("end", ["pass", "sys.exit(0)", "import os; os._exit(0)"])
def test_exit_while_daemon_threads_compute(end):
    for _ in range(3):
        assert run(["-X", "faulthandler", "-c", EXIT.format(end=end)]) == ""


FORK = """
import os, sys, threading
import numpy as np
import groupnorm
groupnorm.set_num_threads(3)
x = np.random.default_rng(0).normal(size=(8, 64, 64, 16)).astype(np.float32)
want = groupnorm.group_norm(x, num_groups=4, implementation="fused")
stop = threading.Event()
def busy():
    while not stop.is_set():
        groupnorm.group_norm(x, num_groups=4)
workers = [threading.Thread(target=busy) for _ in range({workers})]
for worker in workers:
    worker.start()
for turn in range(20):
    child = os.fork()
    if child == 0:
        ok = all(np.array_equal(groupnorm.group_norm(x, num_groups=4), want) for _ in range(3))
        if turn % 4 == 0:  # its own child
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(not np.array_equal(groupnorm.group_norm(x, num_groups=4), want))
            ok = ok and os.waitpid(grandchild, 0)[1] == 0
        if {workers}:
            os._exit(not ok)
        sys.exit(not ok)  # with all that an interpreter does at its end
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(groupnorm.group_norm(x, num_groups=4), want)
stop.set()
for worker in workers:
    worker.join()
"""


@needs_kernels
@needs_forks
@without_sanitizers("asan", "tsan")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_forks_while_other_threads_compute(workers):
    """The child has none of their threads, computes the same bits, and ends."""
    program = FORK.format(workers=workers)
    run(["-W", "ignore::DeprecationWarning", "-c", program])


POOL = """
import os
import numpy as np
from tests.kernels.core import Call
call = Call((4, 1, 1, 500_000))
def started():
    return len(os.listdir("/proc/self/task"))
before = started()
found = []
for threads in (1, 2, 5, 3, 5):
    call.forward(threads)
    found.append(started() - before)
assert found == [0, 1, 4, 4, 4], found
small = Call((4, 1, 1, 5_000))
for _ in range(3):
    small.forward(100)
assert started() - before == 4
"""


@needs_kernels
@needs_linux
def test_threads_start_when_a_call_needs_them_and_stay():
    run(["-c", POOL])


NO_THREADS = """
import os, resource
import numpy as np
from tests.kernels.core import Call
call = Call((4, 1, 1, 500_000))
want = call.forward(1)
inputs, y = call.inputs, call.empty("float32")
def started():
    return len(os.listdir("/proc/self/task"))
before = started()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
# Less than the stack of a thread.
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
call.plan.forward(*inputs, y, False, 3)
assert started() == before
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
assert np.array_equal(call.shaped(y, "float32"), want)
call.plan.forward(*inputs, y, False, 3)
assert started() == before + 2
assert np.array_equal(call.shaped(y, "float32"), want)
"""


@needs_kernels
@needs_linux
@without_sanitizers("asan", "tsan")
def test_no_more_threads_can_be_started():
    run(["-c", NO_THREADS], OPENBLAS_NUM_THREADS="1")
