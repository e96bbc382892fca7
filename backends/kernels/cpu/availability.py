"""Whether the compiled core of the CPU kernels can be used here; loading it."""

import importlib
import logging
from functools import lru_cache
from typing import Any

from groupnorm.adapter import Unsupported
from groupnorm.backends.kernels.cpu.build_report import why_not_built

__all__ = ["core", "why_unavailable"]

_log = logging.getLogger("groupnorm")


@lru_cache(maxsize=1)
def core() -> Any:
    """Import the core, an extension module; requires that `why_unavailable` returned None."""
    return importlib.import_module("groupnorm.backends.kernels.cpu._core")


@lru_cache(maxsize=1)
def why_unavailable() -> Unsupported | None:
    """Return why the kernels are unavailable here; None if they are available."""
    try:
        core()
    except ModuleNotFoundError:
        return Unsupported(why_not_built())
    except ImportError as error:  # it was built for another system
        why = Unsupported(f"the compiled core for CPUs cannot be loaded ({error})")
        _log.warning("groupnorm uses its portable implementation: %s", why.reason)
        return why
    return None
