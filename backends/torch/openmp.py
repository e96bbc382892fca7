"""Running kernels in PyTorch's own threads.

PyTorch's threads spin while idle, so a second pool would compete with them for CPUs. PyTorch has no
API for this, but its threads are those of GNU OpenMP, which has one.
"""

import ctypes
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from groupnorm.backends.kernels.cpu.availability import core
from groupnorm.backends.kernels.cpu.launch import Threads

__all__ = ["torch_threads"]


@lru_cache(maxsize=1)
def torch_threads() -> Threads:
    """Return PyTorch's threads, or as many of ours where they are not those of GNU OpenMP."""
    parallel = _parallel()
    if parallel is not None:
        core().use_openmp(parallel)
    return Threads(torch.get_num_threads, by_openmp=parallel is not None)


def _parallel() -> int | None:
    """Return the address of GOMP_parallel of the OpenMP that PyTorch has loaded, or None."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    for name in _names():
        try:
            found = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value
    return None


def _names() -> Iterator[str]:
    yield from map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    yield "libgomp.so.1"
