"""Helper threads for kernels that release the interpreter lock.

Not numba's own threads: its layers abort the process when two Python threads launch kernels at the
same time (workqueue), or when a forked process launches one (GNU OpenMP).
"""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

__all__ = ["helpers_for", "run_together", "thread_count"]

# Waking a thread takes about as long as processing this many elements.
WORTH_A_THREAD = 1 << 17


def thread_count() -> int:
    """Return the number of threads to use: one for each CPU available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def helpers_for(elements: int) -> int:
    """Return the number of helper threads for `elements` elements, besides the calling thread."""
    parts = elements // WORTH_A_THREAD
    return 0 if parts <= 1 else min(parts, thread_count()) - 1


def run_together(helpers: int, run: Callable[[int], None], argument: int, owner: Any) -> None:
    """Run a function in this thread and concurrently in helper threads.

    Parameters
    ----------
    helpers : int
        The number of helper threads.
    run : callable
        Claims tasks until none is left, and returns when all are done. Helpers that start late find
        no work; nothing waits for them.
    argument : int
        The address passed to `run`.
    owner : object
        Keeps the memory at that address alive for helpers that start late.
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
