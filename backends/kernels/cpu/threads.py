"""Helper threads for kernels that release the interpreter lock.

Not numba's own threads: its layers abort the process when two Python threads launch kernels at the
same time (workqueue), or when a forked process launches one (GNU OpenMP).
"""

import atexit
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from groupnorm.num_threads import get_num_threads

__all__ = ["helpers_for", "run_together"]

# Waking a thread takes about as long as processing this many elements.
WORTH_A_THREAD = 1 << 17


def helpers_for(elements: int) -> int:
    """Return the number of helper threads for `elements` elements, besides the calling thread."""
    parts = elements // WORTH_A_THREAD
    return 0 if parts <= 1 else min(parts, get_num_threads()) - 1


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
        Keeps everything alive that `run` reads or writes. A signal handler may raise an exception
        here after helpers were woken, and then the caller's own references are gone while they
        still work.
    """
    if not helpers:
        run(argument)
        return
    job = _Job(run, argument, owner)
    _pool.start(job, helpers)
    run(argument)
    # All is done: a helper that has not started must not keep the arrays, however late it is.
    job.owner = None


class _Job:
    __slots__ = ("argument", "owner", "run")

    def __init__(self, run: Callable[[int], None], argument: int, owner: Any) -> None:
        self.run, self.argument, self.owner = run, argument, owner


class _Pool:
    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def start(self, job: _Job, helpers: int) -> None:
        """Let up to `helpers` threads run the job."""
        if len(self._threads) < helpers:
            self._grow(helpers)
        for _ in range(min(helpers, len(self._threads))):
            self._jobs.put(job)

    def _grow(self, size: int) -> None:
        with self._lock:
            if not self._threads and not self._closed:
                # Not earlier: handlers run in reverse order, and numba's must run after this one.
                atexit.register(_close)
            while len(self._threads) < size and not self._closed:
                name = f"groupnorm-{len(self._threads)}"
                # Daemons, for `close` ends them; Python would wait for others before it calls that.
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system permits no more threads: there are fewer helpers
                    return
                self._threads.append(thread)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            owner = job.owner
            if owner is not None:
                job.run(job.argument)
            del job, owner  # before waiting for the next one

    def close(self) -> None:
        """End the threads, after the jobs they have begun."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join()


_pool = _Pool()


def _close() -> None:
    """Wait for helpers before the process ends: it frees their code and memory while it exits."""
    _pool.close()


def _forget() -> None:
    """Start anew: a forked process has none of its parent's threads, and maybe a lock they held."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
