"""Whether the compiled core of the CPU kernels can be used here; loading it."""

import importlib
import logging
import os
from functools import lru_cache
from typing import Any

from groupnorm.adapter import Unsupported
from groupnorm.backends.kernels.cpu.build_report import why_not_built

__all__ = ["core", "instructions", "why_unavailable"]

# Read by the core (run.cpp), which takes every value that it does not know for the best.
VARIABLE = "GROUPNORM_INSTRUCTIONS"

_log = logging.getLogger("groupnorm")


@lru_cache(maxsize=1)
def core() -> Any:
    """Import the core, an extension module; requires that `why_unavailable` returned None."""
    found: Any = importlib.import_module("groupnorm.backends.kernels.cpu._core")
    wanted = os.environ.get(VARIABLE)
    if wanted and wanted != found.instructions:
        _log.warning(
            "groupnorm ignores %s=%r and uses %r: it must be 'baseline', 'avx2' or 'avx512', and "
            "the processor must have it.",
            VARIABLE, wanted, found.instructions,
        )  # fmt: skip
    return found


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


def instructions() -> str | None:
    """Return the instruction set that the kernels use; None where there are none."""
    return core().instructions if why_unavailable() is None else None
