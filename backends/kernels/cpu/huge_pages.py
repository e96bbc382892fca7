"""Large pages for large results.

Memory that is fresh from the system costs a fault for every page that is first written: more than
the kernels do. NumPy asks for large pages (since 1.16), PyTorch and XLA do not.
"""

import ctypes
import os
import sys
from functools import lru_cache
from typing import Any

__all__ = ["WORTH", "are_worth_it", "want_large_pages"]

# As NumPy has it: fewer bytes are not worth the call.
WORTH = 1 << 22
MADV_HUGEPAGE = 14
PAGE = 4096


def are_worth_it(size: int) -> bool:
    """Whether a result of so many bytes is to have large pages, which can be asked for here."""
    return size >= WORTH and _system_call() is not None


def want_large_pages(address: int, size: int) -> None:
    """Ask the system for large pages where a result is about to be written.

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
    """Find the function to ask, unless the variable that NumPy reads forbids it."""
    if sys.platform != "linux" or os.environ.get("NUMPY_MADVISE_HUGEPAGE", "1") == "0":
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.restype = ctypes.c_int
    return found
