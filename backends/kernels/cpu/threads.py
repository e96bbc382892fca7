"""Threads that help with a kernel that releases the interpreter's lock.

Not numba's own threads: its layers abort the process where two Python threads launch kernels at
once (workqueue), or where a forked process launches one (GNU OpenMP).
"""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

__all__ = ["helpers_for", "run_together", "thread_count"]

# Waking a thread takes about as long as touching this many elements.
WORTH_A_THREAD = 1 << 17


def thread_count() -> int:
    """Return how many threads take part: one for each CPU this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def helpers_for(elements: int) -> int:
    """Return how many threads are to help with so many elements, beside the caller's own."""
    parts = elements // WORTH_A_THREAD
    return 0 if parts <= 1 else min(parts, thread_count()) - 1


def run_together(helpers: int, run: Callable[[int], None], argument: int, owner: Any) -> None:
    """Run a function in this thread and, at the same time, in others.

    Parameters
    ----------
    helpers : int
        The number of others.
    run : callable
        Claims its share of the work, and returns when all of it is done. Helpers that come when it
        is done find nothing to do, and nobody waits for them.
    argument : int
        An address, which `run` is called with.
    owner : object
        What keeps the memory there, for those who come late.
    """
    if helpers:
        pool = _pool()
        for _ in range(helpers):
            pool.jobs.put((run, argument, owner))
    run(argument)


class _Pool:
    def __init__(self, size: int) -> None:
        self.jobs: SimpleQueue[tuple[Callable[[int], None], int, Any]] = SimpleQueue()
        for number in range(size):
            threading.Thread(target=self._work, name=f"groupnorm-{number}", daemon=True).start()

    def _work(self) -> None:
        while True:
            run, argument, owner = self.jobs.get()
            run(argument)
            del owner


_pools: dict[int, _Pool] = {}
_lock = threading.Lock()


def _pool() -> _Pool:
    # A forked process has none of its parent's threads.
    process = os.getpid()
    found = _pools.get(process)
    if found is None:
        with _lock:
            found = _pools.get(process)
            if found is None:
                _pools.clear()
                found = _pools[process] = _Pool(max(thread_count() - 1, 1))
    return found
