"""Loading compiled kernels, whose compiler may be missing or broken."""

import logging
from collections.abc import Callable

from groupnorm.adapter import Unsupported

__all__ = ["why_not_loaded"]

_log = logging.getLogger("groupnorm")


def why_not_loaded(
    load: Callable[[], object], missing: str, broken: str, where: str = ""
) -> Unsupported | None:
    """Return why kernels cannot be loaded, which is logged too; None if they can.

    Parameters
    ----------
    load : callable
        Imports the kernels.
    missing, broken : str
        The reasons, if a library cannot be imported and for any other failure, with ``{error}``.
    where : str
        What is computed by the portable implementation then, for the log.
    """
    try:
        load()
    except ImportError as error:
        why = missing.format(error=error)
        if isinstance(error, ModuleNotFoundError):  # a choice, of which nobody has to be warned
            return Unsupported(why)
    except Exception as error:
        # Importing a compiler loads libraries and reads the environment, which may raise anything;
        # a private name of it may be missing, or the source files that the cache is keyed by.
        why = broken.format(error=f"{type(error).__name__}: {error}")
    else:
        return None
    _log.warning("groupnorm uses its portable implementation%s: %s", where, why)
    return Unsupported(why)
