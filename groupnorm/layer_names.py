"""The layers in a model, or in any tree of containers and objects, and their names."""

import dataclasses
import functools
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.layer import Layer

__all__ = ["check_name", "named_layers", "shown"]

_LEAVES = (str, bytes, int, float, complex, type(None), type, ModuleType, np.ndarray)
# In the place of a key that gives no name.
_UNNAMED = object()
# The key of a node and the path of what holds it; None at the root.
_Path = tuple[Any, Any] | None


def named_layers(tree: Any, argument: str) -> dict[str, Layer]:
    """Return the layers of a tree by name, such as ``"encoder.blocks.0.norm"``.

    The names are made of keys, indices, fields and attributes; a module of PyTorch has those of its
    `named_modules`. A layer that is in several places is found once, in the first of them. The name
    of a tree that is a layer is empty.

    Raises
    ------
    ArgumentValueError
        If there are no layers, or two with one name, or one without.
    ArgumentTypeError
        If a layer cannot be part of a file.
    """
    found: dict[str, Layer] = {}
    # By id, with the objects themselves: a mapping may make them when they are asked for.
    seen: dict[int, Any] = {}
    stack: list[tuple[_Path, Any]] = [(None, tree)]
    while stack:
        path, node = stack.pop()
        if id(node) in seen or isinstance(node, _LEAVES):
            continue
        seen[id(node)] = node
        if isinstance(node, Layer):
            name = _name(path, argument)
            if name in found:
                raise ArgumentValueError(
                    f"{argument} has two layers of the name {name!r}: rename a key with a dot, or "
                    "one that is a number."
                )
            # One that was replaced in a model may compute more than its configuration says.
            refuse = getattr(node, "_refuse", None)
            if refuse is not None:
                refuse(f"groupnorm.{'load' if argument == 'into' else 'save'}")
            found[name] = node
            continue
        _check_kind(node, path, argument)
        children = list(_children(node))
        stack += [((path, key), child) for key, child in reversed(children)]
    if not found:
        raise ArgumentValueError(
            f"{argument} is of type {type(tree).__name__} and has no layers of this library: give "
            "a GroupNorm, or a dict, list, dataclass, module or other object with some."
        )
    return found


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(node, torch.nn.Module):
        return list(node.named_children())  # other attributes are no part of a module, as there
    if isinstance(node, Mapping):
        usable = {k: isinstance(k, str | int) and not isinstance(k, bool) for k in node}
        return [(key if usable[key] else _UNNAMED, node[key]) for key in usable]
    if isinstance(node, list | tuple | deque):
        names = getattr(node, "_fields", None)  # of a NamedTuple
        return list(enumerate(node)) if names is None else list(zip(names, node, strict=True))
    if isinstance(node, set | frozenset):
        return [(_UNNAMED, child) for child in node]
    if isinstance(node, functools.partial):
        return [(name, getattr(node, name)) for name in ("func", "args", "keywords")]
    names = []
    for cls in type(node).__mro__:
        slots = getattr(cls, "__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            hidden = name.startswith("__") and not name.endswith("__")
            names.append(f"_{cls.__name__.lstrip('_')}{name}" if hidden else name)
    fields = dataclasses.fields(node) if dataclasses.is_dataclass(node) else ()
    names += [field.name for field in fields]
    own = {name: getattr(node, name, None) for name in names if not name.startswith("__")}
    attributes = getattr(node, "__dict__", None)
    return (own | attributes if isinstance(attributes, dict) else own).items()


def _name(path: _Path, argument: str) -> str:
    keys: list[Any] = []
    while path is not None:
        path, key = path
        keys.append(key)
    if _UNNAMED in keys:
        raise ArgumentValueError(
            f"{argument} has a layer in a set, or below a key that is neither str nor int, which "
            "gives it no name: use a list, or a dict with strings as keys."
        )
    parts = [str(key) for key in reversed(keys)]
    if "" in parts:
        raise ArgumentValueError(f"{argument} has a layer below an empty key: give it a name.")
    return check_name(".".join(parts))


def check_name(name: str) -> str:
    """Return a name; raise `ArgumentValueError` if no file can hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ArgumentValueError(
            f"the name {name!r} of a layer is no valid Unicode: use another one."
        ) from None
    return name


def shown(name: str) -> str:
    """Return a layer's name for messages."""
    return repr(name) if len(name) <= 120 else f"{name[:117]!r}..."


def _check_kind(node: Any, path: _Path, argument: str) -> None:
    """Refuse modules whose parameters are held in another framework's way: they would be missed."""
    into = argument == "into"
    for base in type(node).__mro__:
        if base.__module__.startswith("keras.") and base.__name__ == "Layer":
            raise ArgumentTypeError(
                f"{argument} has {_of_module(path, argument)} of keras: its own save and load are "
                "for that. Give the layers of this library in it by themselves, in a dict."
            )
        if base.__module__.startswith("groupnorm.") and base.__name__.startswith("GroupNorm"):
            raise ArgumentTypeError(
                f"{argument} has {_of_module(path, argument)} of the class "
                f"{base.__module__}.{base.__name__}, which is one of another framework: "
                + (
                    "load without into, and make a module of each layer by to_."
                    if into
                    else "save it with that framework, or make a layer of it by GroupNorm.from_."
                )
            )


def _of_module(path: _Path, argument: str) -> str:
    name = _name(path, argument)
    return f"a module {name!r}" if name else "a module"
