"""Huge pages for large results.

First-touch page faults of freshly mapped memory cost more than the kernels themselves. NumPy
requests huge pages (since 1.16), PyTorch and XLA do not.
"""

import ctypes
import os
import sys
from functools import lru_cache
from typing import Any

__all__ = ["WORTH", "are_worth_it", "want_large_pages"]

# In bytes, as in NumPy: smaller results are not worth the call.
WORTH = 1 << 22
MADV_HUGEPAGE = 14
PAGE = 4096


def are_worth_it(size: int) -> bool:
    """Whether to request huge pages for a result of `size` bytes, where that is possible."""
    return size >= WORTH and _system_call() is not None


def want_large_pages(address: int, size: int) -> None:
    """Request huge pages for memory that a result is about to be written to.

    Parameters
    ----------
    address : int
    size : int
        In bytes.
    """
    if are_worth_it(size):
        begin = -(-address // PAGE) * PAGE
        _system_call()(begin, (address + size) // PAGE * PAGE - begin, MADV_HUGEPAGE)


@lru_cache(maxsize=1)
def _system_call() -> Any:
    """Return `madvise`, or None without it or if the variable that NumPy reads forbids it."""
    if sys.platform != "linux" or os.environ.get("NUMPY_MADVISE_HUGEPAGE", "1") == "0":
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.restype = ctypes.c_int
    return found
