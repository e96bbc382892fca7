"""Refuse layers that a module of another framework holds and would never train.

Frameworks train the parameters that they know. A layer with plain arrays as an attribute of a
module of flax, haiku, keras or brainstate, and a NumPy layer in any module, would stay as it was
initialized, and nothing would say so. Who calls a layer is found on the stack, by public means.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping
from inspect import CO_OPTIMIZED, CO_VARARGS, CO_VARKEYWORDS
from types import CodeType
from typing import Any, NamedTuple

from groupnorm.errors import ArgumentStateError

__all__ = ["check_is_trained"]


class _Framework(NamedTuple):
    """A framework with modules of its own."""

    label: str
    #: What to use instead.
    fix: str
    #: Whether parameters are no attributes of modules, so that no layer made elsewhere is trained.
    functional: bool = False
    #: The package and the class of the objects that hold parameters, which are trained.
    parameters: str = "?.?"


# By the module, or the package, and the name of the base class of modules.
_FRAMEWORKS = {
    ("flax.linen", "Module"): _Framework("flax linen", "groupnorm.flax.linen.GroupNorm", True),
    ("flax.nnx", "Module"): _Framework(
        "flax nnx",
        "groupnorm.flax.nnx.GroupNorm, or param_type=flax.nnx.Param",
        False,
        "flax.Param",
    ),
    ("haiku", "Module"): _Framework("haiku", "groupnorm.haiku.GroupNorm", True),
    ("keras", "Layer"): _Framework("keras", "groupnorm.keras.GroupNormalization"),
    ("brainstate", "Module"): _Framework(
        "brainstate",
        "groupnorm.brainstate.GroupNorm, or param_type=brainstate.ParamState",
        False,
        "brainstate.ParamState",
    ),
    ("equinox", "Module"): _Framework("equinox", "groupnorm.equinox.GroupNorm or backend='jax'"),
    ("torch", "Module"): _Framework("PyTorch", "backend='torch'"),
    ("mlx", "Module"): _Framework("MLX", "backend='mlx'"),
}
_PACKAGES = ("flax", "haiku", "keras", "brainstate", "equinox", "torch", "mlx")
# How many objects are looked at in a search, and those that hold no others.
_BUDGET = 2000
_LEAVES = (str, bytes, int, float, complex, type(None), type)
_HAIKU = _FRAMEWORKS["haiku", "Module"]
_by_class: dict[type, _Framework | None] = {}


def check_is_trained(layer: Any) -> None:
    """Raise `ArgumentStateError` if a module that calls a layer holds it and does not train it.

    Called by layers that are no modules themselves, with parameters that are trainable.
    """
    held = [stored for stored in layer._held.values() if stored is not None]
    if not held or not any(name in sys.modules for name in _PACKAGES):
        return
    start: Any = sys._getframe(3)
    frame = start
    settled = set()  # frameworks that were found to train it
    while frame is not None:
        found = _module_of(frame)
        if found is not None and found[0].label not in settled:
            framework, module = found
            if not _is_trained(layer, held, framework):
                holds = module is not None and _holds(module, layer, [_BUDGET])
                missed = holds or (framework.functional and not _is_given(layer, start, frame))
                if missed and not _is_parameter(held, framework, frame):
                    raise _never_trained(layer, framework, module)
                if framework.functional:
                    settled.add(framework.label)
        frame = frame.f_back


def _module_of(frame: Any) -> "tuple[_Framework, Any] | None":
    """Return the framework and the module whose method a frame runs."""
    if _is_method(frame.f_code):
        module = _arguments(frame)[0]
        framework = _framework_of(type(module))
        if framework is not None:
            return framework, module
    # A function that haiku transforms needs no module.
    if frame.f_globals.get("__name__") == "haiku._src.transform":
        return _HAIKU, None
    return None


@functools.lru_cache(4096)
def _is_method(code: CodeType) -> bool:
    """Whether code was written in a class, and has an argument."""
    names = code.co_qualname.split(".")
    return bool(code.co_argcount and len(names) > 1 and names[-2] != "<locals>")


def _is_given(layer: Any, frame: Any, last: Any) -> bool:
    """Whether a layer was passed to a function, as what is trained elsewhere is."""
    while True:
        arguments = _arguments(frame)
        # Not those of its own methods, nor the modules, which would train it themselves.
        own = bool(arguments) and arguments[0] is layer
        if not own and _holds(
            [a for a in arguments if not _framework_of(type(a))], layer, [_BUDGET]
        ):
            return True
        if frame is last:
            return False
        frame = frame.f_back


def _arguments(frame: Any) -> list[Any]:
    """Return the arguments of a function that runs."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += sum(bool(code.co_flags & flag) for flag in (CO_VARARGS, CO_VARKEYWORDS))
    if not count or not code.co_flags & CO_OPTIMIZED:
        return []
    values = frame.f_locals
    found = [values.get(name) for name in code.co_varnames[:count]]
    # Before Python 3.13 the frame keeps this dict, and with it all that the function has deleted
    # since. It is emptied, unless something else refers to it, such as the caller of `locals`, or
    # writes it back, as debuggers do.
    traced = frame.f_trace is not None or sys.gettrace() is not None
    if type(values) is dict and sys.getrefcount(values) <= 3 and not traced:
        values.clear()
    return found


def _is_parameter(held: list[Any], framework: _Framework, frame: Any) -> bool:
    """Whether what a layer holds are parameters of a module of flax linen that calls it."""
    while framework.functional and frame is not None:
        found = _module_of(frame)
        if found is not None and found[0] is framework and _has(found[1], held):
            return True
        frame = frame.f_back
    return False


def _has(module: Any, held: list[Any]) -> bool:
    """Whether what a layer holds are parameters of a module of flax linen."""
    try:
        variables = getattr(module, "variables", None)
    except ValueError:  # the module is not bound to any
        return False
    if not isinstance(variables, Mapping):
        return False
    leaves = sys.modules["jax"].tree_util.tree_leaves(dict(variables))
    return any(leaf is stored for leaf in leaves for stored in held)


def _framework_of(cls: type) -> _Framework | None:
    # Those of equinox that only wrap a function, such as that of filter_jit, hold no model.
    if cls.__module__.startswith("equinox._"):
        return None
    if cls not in _by_class:
        _by_class[cls] = next(
            (
                framework
                for base in cls.__mro__
                for (package, name), framework in _FRAMEWORKS.items()
                if base.__name__ == name and f"{base.__module__}.".startswith(f"{package}.")
            ),
            None,
        )
    return _by_class[cls]


def _is_trained(layer: Any, held: list[Any], framework: _Framework) -> bool:
    """Whether modules of a framework train a layer that they hold."""
    # Of the classes, also those that a user's class derives from.
    names = [{f"{c.__module__}.{c.__name__}" for c in type(stored).__mro__} for stored in held]
    if framework.label == "equinox":  # it trains the arrays of trees; states are no trees
        states = any(n.startswith("brainstate.") for known in names for n in known)
        return layer.backend == "jax" and not states
    root, _, kind = framework.parameters.partition(".")
    return all(
        any(n.startswith(f"{root}.") and n.endswith(f".{kind}") for n in known) for known in names
    )


def _holds(part: Any, layer: Any, budget: list[int], depth: int = 4) -> bool:
    """Whether a layer is in a list, tuple, dict, set or dataclass, or a module in these.

    The search ends with the budget, as lists of data may be long.
    """
    parts: list[Any] = []
    if _framework_of(type(part)) is not None:
        parts += getattr(part, "__dict__", {}).values()
    if isinstance(part, Mapping):  # as modules of MLX are, too
        parts += itertools.islice(part.values(), budget[0])
    elif isinstance(part, list | tuple | set):
        parts += itertools.islice(part, budget[0])
    elif dataclasses.is_dataclass(part):
        parts += getattr(part, "__dict__", {}).values()
    budget[0] -= len(parts)
    if any(p is layer for p in parts):
        return True
    return depth > 0 and any(
        budget[0] > 0 and _holds(p, layer, budget, depth - 1)
        for p in parts
        if not isinstance(p, _LEAVES)
    )


def _never_trained(layer: Any, framework: _Framework, module: Any) -> ArgumentStateError:
    where = "" if module is None else f", in {type(module).__name__}"
    kind = {"numpy": "NumPy arrays", "jax": "JAX arrays"}.get(layer.backend, "arrays")
    return ArgumentStateError(
        f"a GroupNorm whose parameters are {kind} is called by a module of {framework.label}"
        f"{where}, whose training leaves them as they are: use {framework.fix}. If they are "
        "constants, say so with trainable=False."
    )
