"""Classes that are made for modules whose class is changed: named, copied and pickled as theirs."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from groupnorm.errors import ArgumentTypeError

_lock = threading.Lock()
_classes: dict[Any, type] = {}

__all__ = ["Swapped", "check_class", "original_class", "swapped_class"]


class Swapped:
    """A module whose class was made from another one."""

    # The function that makes this class from the original one.
    _make: Any
    _original_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the original class, since this one is in no module."""
        state = self.__getstate__()
        return _restored, (type(self)._make, self._original_class), state

    def _get_name(self) -> str:
        return self._original_class.__name__


def check_class(cls: Any, whose: str) -> None:
    """Check that a registered class is one of modules.

    Raises
    ------
    ArgumentTypeError
        If it is not.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise ArgumentTypeError(
            f"cls={cls!r} is not a subclass of torch.nn.Module: give the class of the modules "
            f"{whose}."
        )


def _restored(make: Callable[[type], type], original: type) -> Any:
    cls = make(original)
    return object.__new__(cls)


def swapped_class(
    original: type, bases: tuple[type, ...], own: dict[str, Any], make: Callable[[type], type]
) -> type:
    """Return a class named as the original one, which can be pickled by calling `make`.

    The same for the same arguments, in all threads.
    """
    key = (original, bases, tuple(own.items()))
    with _lock:
        if key not in _classes:
            named = {"__module__": original.__module__, "__qualname__": original.__qualname__}
            members = {**named, **own, "_make": staticmethod(make)}
            _classes[key] = type(original.__name__, bases, members)
        return _classes[key]


def original_class(module: Any) -> type | None:
    """Return the class that a module had before it was replaced; None if it was not."""
    found: type | None = getattr(module, "_original_class", None)
    return found
