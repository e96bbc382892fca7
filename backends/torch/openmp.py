"""Running kernels in PyTorch's own threads.

PyTorch's threads spin while idle, so a second pool would compete with them for CPUs. PyTorch has no
API for this, but its threads are those of GNU OpenMP, which has one.
"""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from groupnorm.backends.kernels.cpu.availability import core, why_unavailable
from groupnorm.backends.kernels.cpu.launch import OWN, Threads

__all__ = ["TORCH_THREADS"]


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


def _torch_threads() -> Threads:
    if why_unavailable() is not None:
        return OWN
    parallel = _parallel()
    if parallel is not None:
        core().use_openmp(parallel)
    return Threads(torch.get_num_threads, by_openmp=parallel is not None)


#: PyTorch's threads, or as many of ours where these are not of GNU OpenMP. Found on import of this
#: module, because torch.compile may trace the calls that use them.
TORCH_THREADS = _torch_threads()
