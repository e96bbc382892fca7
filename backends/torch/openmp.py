"""Running kernels in PyTorch's own threads.

PyTorch's threads spin while idle, so a second pool would compete with them for CPUs. PyTorch has no
API for this, but its threads are those of GNU OpenMP, which has one.
"""

import ctypes
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from groupnorm.backends.kernels.cpu.threads import run_together

__all__ = ["run_in_torch_threads", "torch_helpers_for"]

# Elements per thread. Idle threads spin for a while before they sleep, so they start at once.
WORTH_A_THREAD = 1 << 14

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_process = os.getpid()


def torch_helpers_for(elements: int) -> int:
    """Return the number of helper threads for `elements` elements, of those PyTorch may use."""
    parts = elements // WORTH_A_THREAD
    return 0 if parts <= 1 else min(parts, torch.get_num_threads()) - 1


def run_in_torch_threads(helpers: int, run: Any, argument: int, owner: Any) -> None:
    """As `run_together` of `kernels.cpu.threads`, in PyTorch's threads if possible.

    `run` is a C function, so the threads do not need Python's lock.
    """
    if not helpers:
        run(argument)
        return
    parallel = _parallel()
    # A forked process has none of its parent's threads, and OpenMP would wait for them.
    if parallel is None or os.getpid() != _process:
        run_together(helpers, run, argument, owner)
    else:
        parallel(run, argument, helpers + 1, 0)


@lru_cache(maxsize=1)
def _parallel() -> Any:
    """Return GOMP_parallel of the OpenMP that PyTorch has loaded, or None."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    for name in _names():
        try:
            found = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
        except (OSError, AttributeError):
            continue
        found.argtypes = (_Function, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        found.restype = None
        return found
    return None


def _names() -> Iterator[str]:
    yield from map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    yield "libgomp.so.1"
