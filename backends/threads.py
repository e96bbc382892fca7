"""A range of tasks shared by threads that need no interpreter: for kernels that release the GIL.

Not numba's own threads: its layers abort the process where two Python threads launch kernels at
once (workqueue), or where a forked process launches one (GNU OpenMP).
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["over_threads", "thread_count"]

# Handing work to a thread takes about as long as touching this many elements.
WORTH_A_THREAD = 1 << 16

_pools: dict[int, ThreadPoolExecutor] = {}


def thread_count() -> int:
    """Return how many threads take part: one for each CPU this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def over_threads(tasks: int, elements: int, run: Callable[[int, int], None]) -> None:
    """Call ``run(start, stop)`` for ranges that cover all tasks, at the same time.

    Parameters
    ----------
    tasks : int
        Their number; each must be independent of the others.
    elements : int
        How many numbers all of them touch, which decides whether threads are worth it.
    run : callable
        Must release the GIL for most of its time.
    """
    parts = min(tasks, elements // WORTH_A_THREAD)
    if parts > 1:
        parts = min(parts, thread_count())
    if parts <= 1:
        run(0, tasks)
        return
    bounds = [tasks * i // parts for i in range(parts + 1)]
    others = [_pool().submit(run, start, stop) for start, stop in itertools.pairwise(bounds[1:])]
    try:
        run(bounds[0], bounds[1])
    finally:
        for other in others:
            other.result()


def _pool() -> ThreadPoolExecutor:
    # A forked process has none of its parent's threads.
    process = os.getpid()
    if process not in _pools:
        _pools.clear()
        _pools[process] = ThreadPoolExecutor(max(thread_count() - 1, 1), "groupnorm")
    return _pools[process]
