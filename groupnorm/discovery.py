"""Which backends are here."""

import importlib.util
import sys
from collections.abc import Mapping
from typing import NamedTuple

from groupnorm.dispatch import adapter_named, backend_names, implementations_on, root_of

__all__ = ["BackendInfo", "available_backends"]


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
    implementations : mapping of str to tuple of str
        For each of `devices`, what ``implementation=`` can be there for ordinary calls in float32.
        The first is what ``implementation=None`` takes; calls it does not serve are computed by
        ``"portable"``. ``"native"`` is taken by nobody who does not ask for it.
    why_not_fused : mapping of str to str
        For each of `devices` without ``"fused"`` the reason, and what to install if that helps.
    """

    name: str
    installed: bool
    version: str | None
    devices: tuple[str, ...]
    error: str | None
    implementations: Mapping[str, tuple[str, ...]]
    why_not_fused: Mapping[str, str]


def available_backends() -> tuple[BackendInfo, ...]:
    """Ask every backend whether it is installed, what it can compute on, and by what.

    This imports the libraries that are installed, numba for the kernels included. It compiles
    nothing.

    Returns
    -------
    tuple of BackendInfo
        For NumPy, JAX, PyTorch and CuPy, in this order.

    Examples
    --------
    >>> from groupnorm import available_backends
    >>> numpy = available_backends()[0]
    >>> numpy.devices
    ('cpu',)
    >>> "portable" in numpy.implementations["cpu"]  # and "fused", where numba is installed
    True
    """
    return tuple(_ask(name) for name in backend_names())


def _ask(name: str) -> BackendInfo:
    library = root_of(name)
    if importlib.util.find_spec(library) is None:
        return BackendInfo(name, False, None, (), None, {}, {})
    try:
        adapter = adapter_named(name)
        devices = adapter.devices()
        implementations = {device: implementations_on(adapter, device) for device in devices}
        reasons = {device: adapter.kernels.why_unavailable(device) for device in devices}
    except (ImportError, OSError, RuntimeError) as error:  # no driver, or a library will not load
        reason = str(error).partition("\n")[0]
        return BackendInfo(name, True, _version(library), (), reason, {}, {})
    why_not_fused = {device: why.reason for device, why in reasons.items() if why is not None}
    return BackendInfo(name, True, _version(library), devices, None, implementations, why_not_fused)


def _version(library: str) -> str | None:
    """Return the version of a library, unless it cannot even be imported."""
    version: str | None = getattr(sys.modules.get(library), "__version__", None)
    return version
