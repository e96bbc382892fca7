"""Find the adapter of an array or a name, and the implementation that computes a call.

Each library has one row here. Its modules are imported when it is first needed, in `Backend.load`;
these imports, and those of `groupnorm.layer` in each library's layer, are the only ones between
this package and its backends.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from groupnorm.adapter import Adapter, Unsupported, not_an_array
from groupnorm.errors import ArgumentValueError, BackendImportError
from groupnorm.portable.group_norm import group_norm, group_norm_vjp
from groupnorm.portable.inputs import check
from groupnorm.portable.per_sample import PerSample, is_per_sample

if TYPE_CHECKING:
    from groupnorm.arguments import CallOptions
    from groupnorm.layer import GroupNorm
    from groupnorm.typing import Array, Gradients

__all__ = [
    "Backend",
    "adapter_named",
    "adapter_of",
    "backend_names",
    "compute",
    "compute_local",
    "compute_with_pullback",
    "implementations_on",
    "layer_class_named",
    "register",
    "root_of",
]


# Finding adapters and layers ----------------------------------------------------------------------


class Backend(NamedTuple):
    """What this package must know about a library before importing it."""

    #: The name for `backend=`; also that of the extra that installs the library.
    name: str
    #: Root modules of its array classes. This also covers tracers, parameters and subclasses,
    #: and needs no import. The first is the library itself.
    roots: tuple[str, ...]
    #: Imports and returns its adapter and its layer class, with import statements, which
    #: torch.compile can trace if the very first call is a compiled one.
    load: "Callable[[], tuple[Adapter, type[GroupNorm]]]"


def _numpy() -> "tuple[Adapter, type[GroupNorm]]":
    from groupnorm.backends.numpy.adapter import numpy_adapter
    from groupnorm.backends.numpy.layer import NumpyGroupNorm

    return numpy_adapter, NumpyGroupNorm


def _jax() -> "tuple[Adapter, type[GroupNorm]]":
    from groupnorm.backends.jax.adapter import jax_adapter
    from groupnorm.backends.jax.layer import JaxGroupNorm

    return jax_adapter, JaxGroupNorm


def _torch() -> "tuple[Adapter, type[GroupNorm]]":
    from groupnorm.backends.torch.adapter import torch_adapter
    from groupnorm.backends.torch.layer import TorchGroupNorm

    return torch_adapter, TorchGroupNorm


def _cupy() -> "tuple[Adapter, type[GroupNorm]]":
    from groupnorm.backends.cupy.adapter import cupy_adapter
    from groupnorm.backends.cupy.layer import CupyGroupNorm

    return cupy_adapter, CupyGroupNorm


def _mlx() -> "tuple[Adapter, type[GroupNorm]]":
    from groupnorm.backends.mlx.adapter import mlx_adapter
    from groupnorm.backends.mlx.layer import MlxGroupNorm

    return mlx_adapter, MlxGroupNorm


_backends: dict[str, Backend] = {}
_names_by_root: dict[str, str] = {}
# Filled as libraries are imported. Not functools.cache: torch.compile ignores that cache, and then
# fails on the import statement.
_loaded: "dict[str, tuple[Adapter, type[GroupNorm]]]" = {}


def register(backend: Backend) -> None:
    """Add a library."""
    _backends[backend.name] = backend
    _names_by_root.update(dict.fromkeys(backend.roots, backend.name))


register(Backend("numpy", ("numpy",), _numpy))
register(Backend("jax", ("jax", "jaxlib"), _jax))
register(Backend("torch", ("torch",), _torch))
register(Backend("cupy", ("cupy",), _cupy))
register(Backend("mlx", ("mlx",), _mlx))


def backend_names() -> tuple[str, ...]:
    """Return the names that `backend=` accepts."""
    return tuple(_backends)


def root_of(name: str) -> str:
    """Return the name of the module to import for a backend's library."""
    return _backends[name].roots[0]


def adapter_named(name: str) -> Adapter:
    """Return the adapter of a backend, importing its library.

    Raises
    ------
    ArgumentValueError
        If there is no backend of that name.
    BackendImportError
        If its library cannot be imported.
    """
    # Does not keep what it loads: the operators call it while torch.compile traces `adapter_of`,
    # which may be traced twice, and must take the same path both times.
    loaded = _loaded.get(name)
    return _load(name)[0] if loaded is None else loaded[0]


def layer_class_named(name: str) -> "type[GroupNorm]":
    """Return the layer class of a backend, importing its library; raises as `adapter_named`."""
    loaded = _loaded.get(name)
    return _kept(name)[1] if loaded is None else loaded[1]


def _load(name: str) -> "tuple[Adapter, type[GroupNorm]]":
    if name not in _backends:
        raise ArgumentValueError(
            f"backend={name!r} is not known: choose one of {', '.join(map(repr, _backends))}."
        )
    try:
        return _backends[name].load()
    except ImportError as error:
        if isinstance(error, BackendImportError):
            raise
        raise BackendImportError(
            f"backend={name!r} needs a library that cannot be imported ({error}): install it with "
            f'pip install "groupnorm[{name}]".'
        ) from error


def _kept(name: str) -> "tuple[Adapter, type[GroupNorm]]":
    return _loaded.setdefault(name, _load(name))


def adapter_of(x: Any, argument: str = "x") -> Adapter:
    """Return the adapter of an array.

    Raises
    ------
    ArgumentTypeError
        If x is not an array.
    """
    for cls in type(x).__mro__:
        name = _names_by_root.get(cls.__module__.partition(".")[0])
        if name is not None:
            loaded = _loaded.get(name)
            adapter = _kept(name)[0] if loaded is None else loaded[0]
            if adapter.is_array(x):
                return adapter
    if hasattr(x, "__array_namespace__") or "dask" in sys.modules:
        from groupnorm.backends.array_api import generic_adapter_of

        generic = generic_adapter_of(x)
        if generic is not None:
            return generic
    raise not_an_array(x, argument)


# Choosing the implementation ----------------------------------------------------------------------


def compute(
    adapter: Adapter, x: "Array", scale: "Array", bias: "Array", mask: Any, options: "CallOptions"
) -> "Array":
    """Normalize with the fastest implementation, or with the requested one.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If an argument is invalid, or if the requested implementation cannot compute the call.
    """
    if adapter.has_sharded_arrays:
        over_shards = adapter.sharded_call(x)
        if over_shards is not None:
            return over_shards(compute_local, adapter, x, scale, bias, mask, options)
    return compute_local(adapter, x, scale, bias, mask, options)


def compute_local(
    adapter: Adapter, x: "Array", scale: "Array", bias: "Array", mask: Any, options: "CallOptions"
) -> "Array":
    """Normalize as `compute` does, for an array whose type describes no sharding."""
    if is_per_sample(x, scale, bias, options):
        if _kernels_take_rows(options):
            result = adapter.kernels.forward(x, scale, bias, mask, options)
            if not isinstance(result, Unsupported):
                return result
        call = PerSample.of(adapter, x, scale, bias, mask, options)
        y = compute_local(adapter, x, None, None, mask, call.without_parameters)
        return call.apply(y)
    wanted = options.implementation
    if wanted == "portable":
        return adapter.run(group_norm, x, scale, bias, mask, options)
    if wanted == "native":
        result = adapter.native(x, scale, bias, mask, options)
    elif options.axis_name is not None:
        result = _REPLICAS
    else:
        result = adapter.kernels.forward(x, scale, bias, mask, options)
    if not isinstance(result, Unsupported):
        return result
    if wanted is not None:
        _refuse(result, adapter, x, scale, bias, mask, options)
    return adapter.run(group_norm, x, scale, bias, mask, options)


def compute_with_pullback(
    adapter: Adapter, x: "Array", scale: "Array", bias: "Array", mask: Any, options: "CallOptions"
) -> "tuple[Array, Callable[[Array], Gradients]]":
    """Normalize as `compute` does, and return the pullback as well."""
    result: Any
    if is_per_sample(x, scale, bias, options) and not adapter.is_sharded(x):
        if _kernels_take_rows(options):
            result = adapter.kernels.vjp(x, scale, bias, mask, options)
            if not isinstance(result, Unsupported):
                return result  # type: ignore[no-any-return]
        call = PerSample.of(adapter, x, scale, bias, mask, options)
        y, pullback = compute_with_pullback(
            adapter, x, None, None, mask, call.without_parameters
        )  # fmt: skip
        return call.apply(y), call.pullback(y, pullback)
    wanted = options.implementation
    if wanted == "portable" or adapter.is_sharded(x):
        return adapter.run(group_norm_vjp, x, scale, bias, mask, options)
    if wanted == "native":
        result = Unsupported("the library's own group normalization comes without a pullback")
    elif options.axis_name is not None:
        result = _REPLICAS
    else:
        result = adapter.kernels.vjp(x, scale, bias, mask, options)
    if not isinstance(result, Unsupported):
        return result  # type: ignore[no-any-return]
    if wanted is not None:
        _refuse(result, adapter, x, scale, bias, mask, options)
    return adapter.run(group_norm_vjp, x, scale, bias, mask, options)


def _kernels_take_rows(options: "CallOptions") -> bool:
    """Whether kernels may compute a call whose parameters have a row for each sample."""
    return options.implementation in (None, "fused") and options.axis_name is None


_REPLICAS = Unsupported("statistics of replicas are pooled by the portable implementation")


def _refuse(
    why: Unsupported, adapter: Adapter, x: "Array", scale: "Array", bias: "Array", mask: Any,
    options: "CallOptions",
) -> None:  # fmt: skip
    """Raise the error for a requested implementation that does not support the call."""
    check(
        adapter, x, scale, bias, mask, options
    )  # the error of an invalid argument takes precedence
    raise ArgumentValueError(
        f"implementation={options.implementation!r} cannot compute this call: {why.reason}. "
        "Use implementation=None, the fastest available for each call, or 'portable'."
    )


def implementations_on(adapter: Adapter, device: str) -> tuple[str, ...]:
    """Return the implementations of ordinary calls on a device, in the order of preference.

    The library's own comes last: it is only used on request.
    """
    fused = ("fused",) if adapter.kernels.why_unavailable(device) is None else ()
    native = ("native",) if type(adapter).native is not Adapter.native else ()
    return (*fused, "portable", *native)
