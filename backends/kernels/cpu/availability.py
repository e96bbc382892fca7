"""Whether there are kernels for CPUs here, and what they need."""

import importlib
from functools import lru_cache
from typing import Any

import numpy as np

from groupnorm.adapter import Unsupported

__all__ = ["constant", "kernels", "why_unavailable"]


@lru_cache(maxsize=2)
def why_unavailable(float16: bool) -> Unsupported | None:
    """Say why there are no kernels here, or none for float16, if there are none.

    This imports numba; until it is asked, nothing does.
    """
    try:
        numbers = kernels("elements")
        kernels("entry_points")
    except ImportError as error:
        return Unsupported(
            f"the kernels for CPUs need numba, which cannot be imported ({error}); "
            'pip install "groupnorm[cpu]" brings it'
        )
    except AttributeError as error:  # a name of numba or llvmlite that is not public
        return Unsupported(f"the kernels for CPUs do not work with this version of numba ({error})")
    except RuntimeError as error:  # numba finds nowhere to keep what it compiles
        return Unsupported(
            f"numba cannot compile the kernels for CPUs here ({error}); where that is for want of "
            "a directory to keep them in, NUMBA_CACHE_DIR names one"
        )
    if float16 and not numbers.has_float16():
        return Unsupported("this CPU has no instructions for float16")
    return None


@lru_cache(maxsize=4)
def kernels(name: str) -> Any:
    """Import a module of kernels, where `why_unavailable` says nothing."""
    return importlib.import_module(f"groupnorm.backends.kernels.cpu.compiled.{name}")


@lru_cache(maxsize=1024)
def constant(value: float, channels: int) -> Any:
    """Return as many equal parameters as there are channels."""
    return np.full(channels, value, np.float32)
