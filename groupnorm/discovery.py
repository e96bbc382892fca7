"""Which backends are installed and usable."""

import importlib.util
import sys
from collections.abc import Mapping
from typing import NamedTuple

from groupnorm.dispatch import adapter_named, backend_names, implementations_on, root_of

__all__ = ["BackendInfo", "available_backends", "backend_info"]


class BackendInfo(NamedTuple):
    """A backend and its state on this machine.

    Attributes
    ----------
    name : str
        The name for `backend=`.
    installed : bool
        Whether its library is installed.
    version : str or None
        The library's version.
    devices : tuple of str
        The devices it can compute on; empty if it cannot be used.
    error : str or None
        Why an installed library cannot be used.
    implementations : mapping of str to tuple of str
        For each of `devices`, the valid values of ``implementation=`` for ordinary float32 calls.
        ``implementation=None`` uses the first, and ``"portable"`` for calls which that does not
        support. ``"native"`` is only used on request.
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
    """Return for every backend whether it is installed, its devices and its implementations.

    This imports the installed libraries. It compiles nothing.

    Returns
    -------
    tuple of BackendInfo
        For NumPy, JAX, PyTorch, CuPy and MLX, in this order.

    Examples
    --------
    >>> from groupnorm import available_backends
    >>> numpy = available_backends()[0]
    >>> numpy.devices
    ('cpu',)
    >>> "portable" in numpy.implementations["cpu"]  # and "fused"
    True
    """
    return tuple(backend_info(name) for name in backend_names())


def backend_info(name: str) -> BackendInfo:
    """Return whether a backend is installed, its devices and its implementations.

    Parameters
    ----------
    name : str
        One of `groupnorm.dispatch.backend_names`.
    """
    library = root_of(name)
    if importlib.util.find_spec(library) is None:
        return BackendInfo(name, False, None, (), None, {}, {})
    try:
        adapter = adapter_named(name)
        devices = adapter.devices()
        implementations = {device: implementations_on(adapter, device) for device in devices}
        reasons = {device: adapter.kernels.why_unavailable(device) for device in devices}
    except (ImportError, OSError, RuntimeError) as error:  # no driver, or a library fails to load
        reason = str(error).partition("\n")[0] or type(error).__name__
        return BackendInfo(name, True, _version(library), (), reason, {}, {})
    why_not_fused = {device: why.reason for device, why in reasons.items() if why is not None}
    return BackendInfo(name, True, _version(library), devices, None, implementations, why_not_fused)


def _version(library: str) -> str | None:
    version: str | None = getattr(sys.modules.get(library), "__version__", None)
    if version is not None:
        return version
    # The library failed to import, which is when its version is of most use. Imported here, since
    # the module takes longer to import than this whole package.
    import importlib.metadata

    for distribution in importlib.metadata.packages_distributions().get(library, ()):
        return importlib.metadata.version(distribution)
    return None
