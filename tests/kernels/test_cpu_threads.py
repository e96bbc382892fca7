"""Threads of the CPU kernels: their number and limits; interrupts, forks and exits under way."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import groupnorm
from groupnorm import num_threads
from groupnorm.backends.kernels.cpu import threads
from groupnorm.errors import ArgumentTypeError, ArgumentValueError


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
        ({"NUMBA_NUM_THREADS": "3", "OMP_NUM_THREADS": "8"}, 3),
        ({"OMP_NUM_THREADS": "none", "NUMBA_NUM_THREADS": "0"}, 64),
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
    groupnorm.set_num_threads(1)
    assert threads.helpers_for(1 << 30) == 0
    groupnorm.set_num_threads(3)
    assert threads.helpers_for(1 << 30) == 2
    assert threads.helpers_for(1000) == 0


@pytest.mark.parametrize("value", [0, -1])
def test_too_few_threads(value, unset):
    with pytest.raises(ArgumentValueError, match=rf"num_threads={value} .* at least 1"):
        groupnorm.set_num_threads(value)
    assert groupnorm.get_num_threads() == 64


@pytest.mark.parametrize("value", [True, 1.5, "2", None])
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


# Helpers ------------------------------------------------------------------------------------------


def test_a_late_helper_keeps_no_arrays(monkeypatch):
    """The job is done, so that the arrays are freed though no helper has looked at it yet."""
    monkeypatch.setattr(threads._Pool, "_grow", lambda *_: None)
    pool = threads._Pool()
    pool._threads = [None]  # a helper that never comes
    monkeypatch.setattr(threads, "_pool", pool)
    owner = np.zeros(3)
    alive = weakref.ref(owner)
    threads.run_together(1, lambda _: None, 0, owner)
    del owner
    assert pool._jobs.qsize() == 1
    assert alive() is None


def test_an_interrupted_caller_leaves_the_arrays_to_the_helper(monkeypatch):
    """The interrupt comes between waking the helper and running in this thread."""
    pool = threads._Pool()
    monkeypatch.setattr(threads, "_pool", pool)
    started, seen = threading.Event(), []

    def run(_):
        if threading.current_thread() is threading.main_thread():
            started.wait(60)
            raise KeyboardInterrupt
        started.set()
        while len(seen) < 1:  # the caller is gone by then
            time.sleep(0.001)
        seen.append(alive() is not None)

    owner = np.zeros(3)
    alive = weakref.ref(owner)
    with pytest.raises(KeyboardInterrupt):
        threads.run_together(1, run, 0, owner)
    del owner
    assert alive() is not None
    seen.append(None)
    pool.close()
    assert seen[1] is True
    assert alive() is None


def test_no_more_threads_can_be_started(monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    calls = []
    threads.run_together(3, calls.append, 5, None)
    assert calls == [5]


def test_the_pool_grows_with_the_number_of_threads(monkeypatch):
    pool = threads._Pool()
    monkeypatch.setattr(threads, "_pool", pool)
    for helpers, want in ((1, 1), (3, 3), (2, 3)):
        threads.run_together(helpers, lambda _: None, 0, None)
        assert len(pool._threads) == want
    helpers = pool._threads
    pool.close()
    assert not any(thread.is_alive() for thread in helpers)
    threads.run_together(2, lambda _: None, 0, None)  # while the process exits
    assert not pool._threads


# Programs -----------------------------------------------------------------------------------------


def run(arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return done.stdout


needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="the kernels need numba"
)
needs_signals = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="this system has no interval timers"
)


@needs_kernels
@needs_signals
@pytest.mark.parametrize(
    "checks", [{}, {"MALLOC_PERTURB_": "165", "PYTHONMALLOC": "debug"}], ids=["", "perturbed"]
)
def test_interrupted_calls(checks):
    """GROUPNORM_INTERRUPTED_CALLS sets another number of calls, such as 200000."""
    assert "interrupted" in run(["-m", "tests.programs.interrupted_calls"], **checks)


EXIT = """
import os, signal, sys
import numpy as np
import groupnorm
from groupnorm.backends.kernels.cpu import threads
groupnorm.set_num_threads(3)
x = np.ones((8, 64, 64, 64), np.float32)
groupnorm.group_norm(x)
put = threads._Pool.start
def start(self, job, helpers):
    put(self, job, helpers)
    sys.exit(0)  # helpers have begun, and this thread ends the process
threads._Pool.start = start
groupnorm.group_norm(x)
"""


@needs_kernels
def test_exit_while_helpers_run():
    for _ in range(3):
        run(["-c", EXIT])


FORK = """
import os, threading
import numpy as np
import groupnorm
groupnorm.set_num_threads(2)
x = np.random.default_rng(0).normal(size=(8, 64, 64, 16)).astype(np.float32)
want = groupnorm.group_norm(x, num_groups=4)
stop = threading.Event()
def busy():
    while not stop.is_set():
        groupnorm.group_norm(x, num_groups=4)
worker = threading.Thread(target=busy)
worker.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        ok = all(np.array_equal(groupnorm.group_norm(x, num_groups=4), want) for _ in range(3))
        os._exit(not ok)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
worker.join()
"""


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forks_while_another_thread_computes():
    run(["-W", "ignore::DeprecationWarning", "-c", FORK])
