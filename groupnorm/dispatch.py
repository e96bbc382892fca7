"""Which adapter serves an array, or a name. Nothing heavy is imported before it is asked for."""

import sys
from typing import TYPE_CHECKING, Any

from groupnorm.errors import ArgumentTypeError, ArgumentValueError, BackendImportError

if TYPE_CHECKING:
    from groupnorm.backends import Adapter

__all__ = ["BACKENDS", "adapter_named", "adapter_of"]

#: The names `backend=` takes; each has a module of that name in groupnorm.backends.
BACKENDS = ("numpy", "jax", "torch", "cupy")

# The root module of an array's class, or of a class it derives from, says which library it is from.
# That holds for tracers, parameters and tensor subclasses, and costs no import.
_ROOTS = {"numpy": "numpy", "jax": "jax", "jaxlib": "jax", "torch": "torch", "cupy": "cupy"}

# Filled as adapters are imported. Not functools.cache: torch.compile ignores that cache, and then
# fails on the import in here.
_adapters: "dict[str, Adapter]" = {}


def adapter_named(name: str) -> "Adapter":
    """Return the adapter of a backend, importing its library.

    Raises
    ------
    ArgumentValueError
        If there is no backend of that name.
    BackendImportError
        If its library cannot be imported.
    """
    found = _adapters.get(name)
    if found is not None:
        return found
    if name not in BACKENDS:
        raise ArgumentValueError(
            f"backend={name!r} is not known: choose one of {', '.join(map(repr, BACKENDS))}."
        )
    try:
        found = _import_adapter(name)
    except ImportError as error:
        if isinstance(error, BackendImportError):
            raise
        raise BackendImportError(
            f"backend={name!r} needs a library that cannot be imported ({error}): install it with "
            f'pip install "groupnorm[{name}]".'
        ) from error
    return _adapters.setdefault(name, found)


def _import_adapter(name: str) -> "Adapter":
    # Statements, not importlib.import_module: torch.compile can trace these, should the first call
    # of all be a compiled one.
    if name == "numpy":
        from groupnorm.backends.numpy import adapter as numpy_adapter

        return numpy_adapter
    if name == "jax":
        from groupnorm.backends.jax import adapter as jax_adapter

        return jax_adapter
    if name == "torch":
        from groupnorm.backends.torch import adapter as torch_adapter

        return torch_adapter
    from groupnorm.backends.cupy import adapter as cupy_adapter

    return cupy_adapter


def adapter_of(x: Any, argument: str = "x") -> "Adapter":
    """Return the adapter that serves an array.

    Raises
    ------
    ArgumentTypeError
        If x is no array.
    """
    for cls in type(x).__mro__:
        name = _ROOTS.get(cls.__module__.partition(".")[0])
        if name is not None:
            found = _adapters.get(name)
            if found is None:
                found = adapter_named(name)
            if found.is_array(x):
                return found
    if hasattr(x, "__array_namespace__") or "dask" in sys.modules:
        from groupnorm.backends.generic import generic_adapter_of

        generic = generic_adapter_of(x)
        if generic is not None:
            return generic
    raise ArgumentTypeError(
        f"{argument}={_shortened(x)} is of type {type(x).__name__}, not an array: pass an array of "
        f"NumPy, JAX, PyTorch, CuPy or another array API library, such as "
        f"numpy.asarray({argument})."
    )


def _shortened(x: object) -> str:
    text = repr(x)
    return text if len(text) <= 40 else text[:37] + "..."
