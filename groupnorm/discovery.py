"""Which backends are here."""

import importlib.util
from typing import NamedTuple

from groupnorm.dispatch import BACKENDS, adapter_named

__all__ = ["BackendInfo", "available_backends"]

# The distributions that may provide a backend's module, in the order they are looked for.
_DISTRIBUTIONS = {
    "numpy": ("numpy",),
    "jax": ("jax",),
    "torch": ("torch",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy"),
}


class BackendInfo(NamedTuple):
    """One backend of this machine.

    Attributes
    ----------
    name : str
        What `backend=` takes.
    installed : bool
        Whether its library is installed.
    version : str or None
        The library's version.
    devices : tuple of str
        The devices it can compute on; empty if it cannot be used.
    error : str or None
        Why an installed library cannot be used.
    """

    name: str
    installed: bool
    version: str | None
    devices: tuple[str, ...]
    error: str | None


def available_backends() -> tuple[BackendInfo, ...]:
    """Ask every backend whether it is installed and what it can compute on.

    This imports the libraries that are installed.

    Returns
    -------
    tuple of BackendInfo
        For NumPy, JAX, PyTorch and CuPy, in this order.

    Examples
    --------
    >>> from groupnorm import available_backends
    >>> available_backends()[0].devices
    ('cpu',)
    """
    return tuple(_ask(name) for name in BACKENDS)


def _ask(name: str) -> BackendInfo:
    if importlib.util.find_spec(name) is None:
        return BackendInfo(name, False, None, (), None)
    version = _version(name)
    try:
        return BackendInfo(name, True, version, adapter_named(name).devices(), None)
    except (ImportError, OSError, RuntimeError) as error:  # no driver, or a library will not load
        return BackendInfo(name, True, version, (), str(error).partition("\n")[0])


def _version(name: str) -> str | None:
    import importlib.metadata  # here: it takes longer to import than this whole package

    for distribution in _DISTRIBUTIONS[name]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
