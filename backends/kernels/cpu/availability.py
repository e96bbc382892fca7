"""Whether the CPU kernels can be used here; loading them."""

import importlib
import os
from functools import lru_cache
from typing import Any

import numpy as np

from groupnorm.adapter import Unsupported
from groupnorm.backends.kernels.loading import why_not_loaded

__all__ = ["constant", "kernels", "why_unavailable"]


@lru_cache(maxsize=2)
def why_unavailable(float16: bool) -> Unsupported | None:
    """Return why kernels, or those for float16, are unavailable here; None if they are available.

    This call imports numba; nothing imports it earlier.
    """
    why = _why_none()
    if why is None and float16 and not kernels("elements").has_float16():
        return Unsupported("this CPU has no instructions for converting float16")
    return why


@lru_cache(maxsize=1)
def _why_none() -> Unsupported | None:
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return Unsupported("NUMBA_DISABLE_JIT is set, so numba compiles no kernels")
    return why_not_loaded(
        lambda: kernels("entry_points"),
        "the kernels for CPUs need numba, which cannot be imported ({error}); "
        'install it with pip install "groupnorm[cpu]"',
        "the kernels for CPUs cannot be loaded ({error})",
    )


@lru_cache(maxsize=4)
def kernels(name: str) -> Any:
    """Import a module of kernels; requires that `why_unavailable` returned None."""
    return importlib.import_module(f"groupnorm.backends.kernels.cpu.compiled.{name}")


# Calls of many shapes use parts of the same arrays, so that no shape keeps one of its own.
_LONGEST = 4096
_constants = {value: np.full(_LONGEST, value, np.float32) for value in (0.0, 1.0)}


def constant(value: float, channels: int) -> Any:
    """Return a parameter of the same value for every channel: 0 or 1."""
    if channels > _LONGEST:
        return np.full(channels, value, np.float32)
    return _constants[value][:channels]
