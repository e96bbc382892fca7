"""Refuse layers that a module of another framework holds and would never train.

Frameworks train the parameters that they know. A layer with plain arrays as an attribute of a
module of flax, haiku, keras or brainstate, and a NumPy layer in any module, would stay as it was
initialized, and nothing would say so. Who calls a layer is found on the stack, by public means.
"""

import sys
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
    #: The module of the objects that hold parameters, which are trained.
    parameters: str = "?"


# By the module, or the package, and the name of the base class of modules.
_FRAMEWORKS = {
    ("flax.linen", "Module"): _Framework("flax linen", "groupnorm.flax.linen.GroupNorm", True),
    ("flax.nnx", "Module"): _Framework(
        "flax nnx", "groupnorm.flax.nnx.GroupNorm, or param_type=flax.nnx.Param", False, "flax"
    ),
    ("haiku", "Module"): _Framework("haiku", "groupnorm.haiku.GroupNorm", True),
    ("keras", "Layer"): _Framework("keras", "groupnorm.keras.GroupNormalization", True),
    ("brainstate", "Module"): _Framework(
        "brainstate",
        "groupnorm.brainstate.GroupNorm, or param_type=brainstate.ParamState",
        False,
        "brainstate",
    ),
    ("equinox", "Module"): _Framework("equinox", "groupnorm.equinox.GroupNorm or backend='jax'"),
    ("torch", "Module"): _Framework("PyTorch", "backend='torch'"),
    ("mlx", "Module"): _Framework("MLX", "backend='mlx'"),
}
_PACKAGES = ("flax", "haiku", "keras", "brainstate", "equinox", "torch", "mlx")
_HAIKU = _FRAMEWORKS["haiku", "Module"]
_by_class: dict[type, _Framework | None] = {}


def check_is_trained(layer: Any) -> None:
    """Raise `ArgumentStateError` if a module that calls a layer holds it and does not train it.

    Called by layers that are no modules themselves, with parameters that are trainable.
    """
    if not any(name in sys.modules for name in _PACKAGES):
        return
    frame = sys._getframe(2)
    while frame is not None:
        found = _module_of(frame)
        if found is not None:
            framework, module = found
            trained = _is_trained(layer, framework)
            owned = module is not None and _holds(module, layer)
            if owned and trained:
                return
            if (owned or framework.functional) and not trained:
                raise _never_trained(layer, framework, module)
        frame = frame.f_back  # type: ignore[assignment]


def _module_of(frame: Any) -> "tuple[_Framework, Any] | None":
    """Return the framework and the module whose method a frame runs."""
    code = frame.f_code
    if code.co_argcount and code.co_varnames[0] == "self":
        module = frame.f_locals.get("self")
        framework = _framework_of(type(module))
        return None if framework is None else (framework, module)
    # A function that haiku transforms needs no module.
    if frame.f_globals.get("__name__") == "haiku._src.transform":
        return _HAIKU, None
    return None


def _framework_of(cls: type) -> _Framework | None:
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


def _is_trained(layer: Any, framework: _Framework) -> bool:
    """Whether modules of a framework train a layer that they hold."""
    held = [stored for stored in layer._held.values() if stored is not None]
    roots = {type(stored).__module__.partition(".")[0] for stored in held}
    if framework.label == "equinox":  # it trains the arrays of trees; states are no trees
        return layer.backend == "jax" and "brainstate" not in roots
    return roots <= {framework.parameters}


def _holds(module: Any, layer: Any, depth: int = 4) -> bool:
    """Whether a layer is an attribute of a module or of its parts, also in lists and dicts."""
    parts: list[Any] = []
    if _framework_of(type(module)) is not None:
        parts += getattr(module, "__dict__", {}).values()
    if isinstance(module, dict):  # as modules of MLX are, too
        parts += module.values()
    elif isinstance(module, list | tuple | set):
        parts += module
    if any(part is layer for part in parts):
        return True
    return depth > 0 and any(_holds(part, layer, depth - 1) for part in parts)


def _never_trained(layer: Any, framework: _Framework, module: Any) -> ArgumentStateError:
    where = "" if module is None else f", in {type(module).__name__}"
    kind = {"numpy": "NumPy arrays", "jax": "JAX arrays"}.get(layer.backend, "arrays")
    return ArgumentStateError(
        f"a GroupNorm whose parameters are {kind} is called by a module of {framework.label}"
        f"{where}, which does not train them: use {framework.fix}. If they are constants, say so "
        "with trainable=False."
    )
