"""Where a layer keeps its parameters: as arrays, or in the objects of a framework.

A `ParamStore` makes what a framework holds from arrays, reads the arrays back and replaces them.
Frameworks are recognized by the names of their classes, so that none is imported here, and the
order of imports does not matter.
"""

import functools
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from groupnorm.errors import ArgumentTypeError
from groupnorm.typing import Array

__all__ = [
    "ArrayStore",
    "MappingStore",
    "ObjectStore",
    "ParamStore",
    "check_param_type",
    "metadata_of",
    "param_store",
    "register_param_type",
]


class ParamStore(Protocol):
    """How a framework holds the parameters of one layer.

    `values` are the layer's arrays by name, ``"scale"`` and ``"bias"``; what a layer does not have
    is None. What is held are objects by the names of the layer's attributes that a framework finds.
    """

    def create(
        self,
        values: Mapping[str, Array | None],
        metadata: Mapping[str, Mapping[str, Any]],
        trainable: bool,
    ) -> dict[str, Any]:
        """Return what holds the values.

        `metadata` has keyword arguments for each name, such as a sharding; the framework's
        optimizers change it only if `trainable`.
        """
        ...

    def read(self, held: Mapping[str, Any], name: str) -> Array | None:
        """Return the array of a name; None if there is none."""
        ...

    def write(self, held: Mapping[str, Any], name: str, value: Array) -> dict[str, Any]:
        """Return what is held with another array of a name; objects may be changed in place."""
        ...


class ArrayStore:
    """Holds the arrays themselves."""

    def create(
        self,
        values: Mapping[str, Array | None],
        metadata: Mapping[str, Mapping[str, Any]],
        trainable: bool,
    ) -> dict[str, Any]:
        """Return the values; arrays have no metadata."""
        for name, given in metadata.items():
            if given:
                raise ArgumentTypeError(
                    f"{name}_init returned an array with the metadata {dict(given)!r}, which plain "
                    "arrays do not have: pass a param_type that has, such as flax.nnx.Param."
                )
        return dict(values)

    def read(self, held: Mapping[str, Any], name: str) -> Array | None:
        """Return the array, or what a transformation of trees has put in its place."""
        return held[name]

    def write(self, held: Mapping[str, Any], name: str, value: Array) -> dict[str, Any]:
        """Replace the array."""
        return {**held, name: value}


class ObjectStore:
    """Holds one object for each array, which ``param_type(array, **metadata)`` makes.

    Parameters
    ----------
    param_type : callable
        Such as `flax.nnx.Param`.
    frozen_type : callable, optional
        Makes the objects of parameters that are not trainable. Default is `param_type`.
    is_array : callable, optional
        Whether something is an array; what the objects hold is checked with it.
    """

    def __init__(
        self,
        param_type: Callable[..., Any],
        frozen_type: Callable[..., Any] | None = None,
        is_array: Callable[[object], bool] = lambda value: True,
    ) -> None:
        self.param_type = param_type
        self.frozen_type = param_type if frozen_type is None else frozen_type
        self.is_array = is_array

    def create(
        self,
        values: Mapping[str, Array | None],
        metadata: Mapping[str, Mapping[str, Any]],
        trainable: bool,
    ) -> dict[str, Any]:
        """Make an object for each value."""
        make = self.param_type if trainable else self.frozen_type
        return {
            name: None if value is None else self._made(make, value, metadata.get(name, {}))
            for name, value in values.items()
        }

    def _made(self, make: Callable[..., Any], value: Any, metadata: Mapping[str, Any]) -> Any:
        try:
            stored = make(value, **metadata)
        except (AttributeError, TypeError, ValueError) as error:
            raise _no_wrapper(make, str(error)) from error
        if not self.is_array(value_of(stored)):
            raise _no_wrapper(make, f"it returned {stored!r}")
        return stored

    def read(self, held: Mapping[str, Any], name: str) -> Array | None:
        """Return the array in an object."""
        stored = held[name]
        return stored if stored is None or self.is_array(stored) else value_of(stored)

    def write(self, held: Mapping[str, Any], name: str, value: Array) -> dict[str, Any]:
        """Change the object in place, as others refer to it; else make another one."""
        stored = held[name]
        if value_of(stored) is not stored:  # else the type made an array of the array
            try:
                _set_value(stored, value)
                return dict(held)
            except AttributeError:  # an object that cannot be changed
                return {**held, name: self._made(type(stored), value, metadata_of(stored))}
        return {**held, name: self._made(self.param_type, value, {})}


class MappingStore(ObjectStore):
    """Holds one object, ``weight``, of a dict of all arrays, as normalizations of brainstate do."""

    def create(
        self,
        values: Mapping[str, Array | None],
        metadata: Mapping[str, Mapping[str, Any]],
        trainable: bool,
    ) -> dict[str, Any]:
        """Make one object; None if there are no values."""
        given = {name: value for name, value in values.items() if value is not None}
        make = self.param_type if trainable else self.frozen_type
        merged = {key: entry for found in metadata.values() for key, entry in found.items()}
        return {"weight": make(given, **merged) if given else None}

    def read(self, held: Mapping[str, Any], name: str) -> Array | None:
        """Return an entry of the dict."""
        stored = held["weight"]
        values = stored if stored is None or isinstance(stored, Mapping) else value_of(stored)
        # A transformation of trees may have put something else in its place.
        return values.get(name) if isinstance(values, Mapping) else values

    def write(self, held: Mapping[str, Any], name: str, value: Array) -> dict[str, Any]:
        """Replace the dict by one with another entry."""
        stored = held["weight"]
        _set_value(stored, {**value_of(stored), name: value})
        return dict(held)


def value_of(stored: Any) -> Any:
    """Return what a parameter object holds; what is none, as it is."""
    # nnx is about to drop `.value`; brainstate has nothing else.
    get_value = getattr(stored, "get_value", None)
    return getattr(stored, "value", stored) if get_value is None else get_value()


def metadata_of(stored: Any) -> Mapping[str, Any]:
    """Return the metadata of a parameter object, as keyword arguments for its type."""
    get_metadata: Any = getattr(stored, "get_metadata", None)
    return {} if get_metadata is None else dict(get_metadata())


def _set_value(stored: Any, value: Any) -> None:
    set_value = getattr(stored, "set_value", None)
    if set_value is not None:
        set_value(value)
    else:
        stored.value = value


def _no_wrapper(param_type: Any, what: str) -> ArgumentTypeError:
    return ArgumentTypeError(
        f"param_type={param_type!r} cannot wrap an array ({what}): it must return a parameter that "
        "holds the array it is called with, as flax.nnx.Param and torch.nn.Parameter do."
    )


def check_param_type(param_type: Any) -> Any:
    """Return the argument; raise `ArgumentTypeError` if it is neither None nor callable."""
    if param_type is not None and not callable(param_type):
        raise ArgumentTypeError(
            f"param_type={param_type!r} is not callable: it must be a callable that wraps an array "
            "into a parameter, such as flax.nnx.Param, brainstate.ParamState or torch.nn.Parameter."
        )
    return param_type


# Types with a store of their own ------------------------------------------------------------------


# By the names of the framework and of the class: how its objects are held, and the framework's
# class of frozen ones, which optimizers leave out.
_KNOWN: dict[tuple[str, str], tuple[type[ObjectStore], str]] = {
    ("flax", "Param"): (ObjectStore, "flax.nnx:Variable"),
    ("brainstate", "ParamState"): (ObjectStore, "brainstate:LongTermState"),
    ("brainstate", "NormalizationParamState"): (MappingStore, "brainstate:LongTermState"),
}
_registered: dict[type, ParamStore] = {}


def register_param_type(param_type: type, store: ParamStore) -> None:
    """Tell how layers with a `param_type` hold their parameters.

    Needed only for types whose objects are not made by ``param_type(array)``, or do not have the
    array as ``value`` or by ``get_value()``.

    Parameters
    ----------
    param_type : type
        Also registers its subclasses that are not registered themselves.
    store : ParamStore
        An object with the methods `create`, `read` and `write`.

    Raises
    ------
    groupnorm.errors.ArgumentTypeError
        If one of them is of another kind.

    Examples
    --------
    >>> from groupnorm import GroupNorm
    >>> from groupnorm.parameters import ObjectStore, register_param_type
    >>> class Boxed:
    ...     def __init__(self, content):
    ...         self.content = content
    >>> class BoxedStore(ObjectStore):
    ...     def read(self, held, name):
    ...         return held[name] and held[name].content
    ...     def write(self, held, name, value):
    ...         return {**held, name: Boxed(value)}
    >>> register_param_type(Boxed, BoxedStore(Boxed))
    >>> GroupNorm(2, num_groups=1, param_type=Boxed).scale
    array([1., 1.], dtype=float32)
    """
    if not isinstance(param_type, type):
        raise ArgumentTypeError(
            f"param_type={param_type!r} is no class: register the class of the parameters."
        )
    missing = [n for n in ("create", "read", "write") if not callable(getattr(store, n, None))]
    if missing:
        raise ArgumentTypeError(
            f"store={store!r} has no method {missing[0]!r}: it must have create, read and write, "
            "see groupnorm.parameters.ParamStore."
        )
    _registered[param_type] = store


def param_store(param_type: Any, is_array: Callable[[object], bool]) -> ParamStore:
    """Return how a layer with a `param_type` holds its parameters."""
    if param_type is None:
        return _ARRAYS
    cls: Any = param_type
    keywords: dict[str, Any] = {}
    while isinstance(cls, functools.partial):
        cls, keywords = cls.func, {**cls.keywords, **keywords}
    for base in getattr(cls, "__mro__", ()):
        if base in _registered:
            return _registered[base]
        known = _KNOWN.get((base.__module__.partition(".")[0], base.__name__))
        if known is not None:
            store, frozen = known
            frozen_type = functools.partial(pkgutil.resolve_name(frozen), **keywords)
            return store(param_type, frozen_type, is_array)
    return ObjectStore(param_type, None, is_array)


_ARRAYS = ArrayStore()
