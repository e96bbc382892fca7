"""Carry a layer into a module of another framework, and back.

Each framework has a module ``groupnorm.<framework>`` with two functions: ``arguments_of(module)``
(and the parameters, where modules do not hold them) returns what `GroupNorm` is called with, and
``module_of(layer)`` the framework's module, for layers that `_check` has let through. Frameworks
are found by the names of their classes, so that none is imported here.
"""

import functools
import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from groupnorm.dispatch import adapter_named, adapter_of
from groupnorm.errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from groupnorm.layer import GroupNorm, Layer

__all__ = ["carried_from", "carried_to"]


class _Target(NamedTuple):
    """What the group norm of a framework can be."""

    #: Where its channels are in `in_size`; ``...`` is any axis.
    places: tuple[Any, ...]
    #: Its policies for the dtype of the result: None is promotion, "input" that of x, and
    #: "a dtype" a fixed one.
    dtypes: tuple[str | None, ...]
    #: Whether scale and bias are used or not used together.
    affine: bool = False
    #: What it may have besides.
    allowed: tuple[str, ...] = ()


_SHARED = ("reduction_axes", "axis_name", "axis_index_groups")
_TARGETS = {
    "torch": _Target((0,), ("input",), False, ("implementation",)),
    "flax.nnx": _Target((-1,), (None, "a dtype"), False, _SHARED),
    "flax.linen": _Target((-1,), (None, "a dtype"), False, _SHARED),
    "equinox": _Target((0,), ("input",), True),
    "haiku": _Target((0, -1), (None,)),
    "keras": _Target((0, -1), ("a dtype",)),
    "brainstate": _Target((0, -1, ...), (None, "a dtype"), False, _SHARED),
    "mlx": _Target((-1,), (None,), True, ("implementation",)),
}

# Those whose modules do not hold their parameters.
_APART = ("flax.linen", "haiku")


def carried_from(cls: "type[Layer]", module: Any, params: Any) -> Any:
    """Return a layer equal to a framework's; see `GroupNorm.from_`."""
    if params is not None and not isinstance(params, Mapping):
        raise ArgumentTypeError(
            f"params={params!r} is of type {type(params).__name__}: it must be a dict of the "
            "parameters, by the names of the framework."
        )
    if isinstance(module, cls):
        if params is not None:
            raise ArgumentTypeError("params is given, and layers hold their parameters.")
        module._check_hooks()
        return module.to_backend(module.backend)
    # What makes a module of haiku, which itself exists in transformed functions only.
    made = module.func if isinstance(module, functools.partial) else type(module)
    for base in getattr(made, "__mro__", ()):
        for name in _TARGETS:
            if f"{base.__module__}.".startswith(f"{name}."):
                framework = _framework(name)
                if name in _APART:
                    return _layer(cls, module, framework.arguments_of(module, params))
                if params is not None:
                    raise ArgumentTypeError(
                        f"params is given, and modules of {name} hold their parameters."
                    )
                if name == "torch":  # whose modules become layers as they are
                    return framework.layer_of(module)
                return _layer(cls, module, framework.arguments_of(module))
    known = ", ".join(_TARGETS)
    raise ArgumentTypeError(
        f"layer is of type {type(module).__name__}, which is no module of a known framework: pass "
        f"a group norm of one of {known}."
    )


def _layer(cls: "type[Layer]", module: Any, arguments: dict[str, Any]) -> Any:
    """Create the layer, whose parameters are those of the module, in their dtype."""
    given = {}
    for name in ("scale", "bias"):
        value = arguments.pop(name)
        arguments[f"use_{name}"] = value is not None
        if value is not None:
            adapter = adapter_of(value, name)
            given[name] = adapter.to_host(value)
            arguments[f"{name}_init"] = given[name]
    dtypes = {value.dtype for value in given.values()}
    if len(dtypes) > 1:
        raise ArgumentValueError(
            f"layer={type(module).__name__} has a scale of dtype {given['scale'].dtype} and a bias "
            f"of {given['bias'].dtype}: convert one of them, a layer has one dtype."
        )
    if dtypes:
        arguments["param_dtype"] = dtypes.pop().name
    return cls(**arguments)


def carried_to(layer: "GroupNorm", name: str, in_size: Any, feature_axis: Any, dtype: Any) -> Any:
    """Return the framework's module; see `GroupNorm.to_`."""
    target = _TARGETS.get(str(name))
    if target is None:
        raise ArgumentValueError(
            f"name={name!r} is not the name of a framework: choose from {', '.join(_TARGETS)}."
        )
    layer._check_hooks()
    host = _changed(layer, in_size, feature_axis, dtype)
    _check(host, name, target)
    if name != layer.backend:
        trained_as_one(layer._trained(), True, "scale and bias")
    module = _framework(name).module_of(host)
    layer._carry_state(module)
    return module


def _framework(name: str) -> Any:
    return importlib.import_module(f"groupnorm.{name}")


def _changed(layer: "GroupNorm", in_size: Any, feature_axis: Any, dtype: Any) -> Any:
    """Return a NumPy layer with other inputs and another dtype, where they are given."""
    host = layer.to_backend("numpy")
    size, axis = host.in_size, host.feature_axis
    if feature_axis is not ...:
        if feature_axis not in (0, -1):
            raise ArgumentValueError(
                f"feature_axis={feature_axis!r} must be 0, channels on axis 1 of the input, or -1, "
                "on the last."
            )
        channels = channels_of(host)
        size, axis = ((channels, ...), 0) if feature_axis == 0 else ((..., channels), -1)
    if in_size is not ...:
        size = in_size
    if (size, axis) != (host.in_size, host.feature_axis) and host.reduction_axes is not None:
        raise ArgumentValueError(
            f"in_size={in_size!r} and feature_axis={feature_axis!r}: this layer has "
            f"reduction_axes={host.reduction_axes}, which would be other axes then. Leave both "
            "out, or create the module by hand."
        )
    # That of the call: a torch.nn.GroupNorm keeps x's by default.
    results = layer._options.dtype if dtype is ... else dtype
    return host._with(in_size=size, feature_axis=axis, dtype=results)


def _check(layer: "GroupNorm", name: str, target: _Target) -> None:
    """Raise an error for what the framework's group norm cannot be."""

    def refuse(what: str, rule: str, fix: str) -> ArgumentValueError:
        return ArgumentValueError(
            f"this layer has {what}, and a group norm of {name} {rule}: {fix}"
        )

    for option in ("activation", "implementation", *_SHARED):
        value = getattr(layer, option)
        if value is not None and option not in target.allowed:
            raise refuse(f"{option}={value!r}", "has none", "apply or create that by hand.")
    place = place_of(layer)
    if place not in target.places:
        words = {0: "axis 1", -1: "the last axis", ...: "other axes"}
        wanted = " or ".join(words[place] for place in target.places)
        axes = " or ".join(f"feature_axis={place}" for place in target.places)
        raise refuse(
            f"its channels on {words[place]} of the input (in_size={layer.in_size})",
            f"on {wanted}", f"pass {axes}, and inputs laid out like that.",
        )  # fmt: skip
    policy = layer.dtype if layer.dtype in (None, "input") else "a dtype"
    if policy not in target.dtypes:
        names = [f"dtype={d!r}" if d != "a dtype" else "a dtype, such as dtype='float32'"
                 for d in target.dtypes]  # fmt: skip
        raise refuse(f"dtype={layer.dtype!r}", f"has {' or '.join(names)}", "pass that as dtype.")
    if target.affine and layer.use_scale != layer.use_bias:
        used = f"use_scale={layer.use_scale} and use_bias={layer.use_bias}"
        raise refuse(used, "has both or none", "create a layer with both, of ones or zeros.")
    if not layer.trainable and name not in ("torch", "keras", "mlx"):
        raise refuse("trainable=False", "is always trained", "freeze it by the framework's means.")


def place_of(layer: "GroupNorm") -> Any:
    """Return the feature axis if it is the first, 0, or the last, -1; else ``...``."""
    feature, size = layer._options.feature, layer.in_size
    if feature == (-1,):
        return -1
    return 0 if feature == (1,) or (feature == (-len(size),) and ... not in size) else ...


def channels_of(layer: "GroupNorm") -> int:
    """Return the number of channels."""
    return math.prod(layer._config.feature_shape)


def parameters_of(layer: "GroupNorm", backend: str) -> dict[str, Any]:
    """Return the flat parameters by name, those that there are, as arrays of a backend.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If that would round them.
    """
    adapter = adapter_named(backend)
    return {
        name: adapter.from_host(value.reshape(-1))
        for name, value in (("scale", layer.scale), ("bias", layer.bias))
        if value is not None
    }


def shared_arguments(module: Any) -> dict[str, Any]:
    """Return the options that flax, brainstate and this library have under the same names."""
    names = (
        "epsilon", "dtype", "reduction_axes", "axis_name", "axis_index_groups", "use_fast_variance",
    )  # fmt: skip
    return {name: getattr(module, name) for name in names}


def trained_as_one(trained: "list[bool]", default: bool, names: str) -> bool:
    """Return whether parameters are trained; raise an error if one of them alone is."""
    found = set(trained) or {default}
    if len(found) > 1:
        raise ArgumentValueError(
            f"layer trains one of {names} alone: a layer is trained or is not."
        )
    return found.pop()


def check_parameters(values: Mapping[str, Any], used: "set[str]", example: str) -> None:
    """Raise an error unless the parameters given for a module are those that it uses."""
    if not used:
        raise ArgumentValueError(
            "layer has no parameters, from which alone its number of channels is known: create the "
            "GroupNorm with that number instead."
        )
    if set(values) != used:
        raise ArgumentTypeError(
            f"params has {sorted(values)}, and this module {sorted(used)}: pass its own, such as "
            f"{example}. The number of channels is known from them alone."
        )


def check_class(module: Any, own: type, peer: type, method: str) -> None:
    """Raise an error for modules that compute something else than a group norm."""
    found = getattr(type(module), method, None)
    if isinstance(module, peer) and found in (getattr(own, method), getattr(peer, method)):
        return
    raise ArgumentTypeError(
        f"layer is of type {type(module).__name__}, which is no {peer.__module__.split('.')[0]} "
        f"{peer.__name__}, or has a {method} of its own: only a {peer.__name__} can be carried."
    )
