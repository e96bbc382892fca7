"""A layer's configuration as JSON: the arguments of the constructor that make it."""

import json
from typing import Any

from groupnorm.arguments import flag
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.layer import GroupNorm
from groupnorm.layer_config import LayerConfig

__all__ = ["arguments_of", "config_of"]

DTYPES = (
    *("", "input", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2"),
)


def arguments_of(config: LayerConfig) -> dict[str, Any]:
    """Return the arguments of the constructor that make a configuration, as JSON has them."""
    options, axis = config.options, config.feature_axis
    return {
        "in_size": ["..." if n is ... else n for n in config.in_size],
        "feature_axis": axis if isinstance(axis, int) else list(axis),
        "num_groups": options.num_groups,
        "epsilon": options.epsilon,
        "dtype": options.dtype,
        "use_bias": config.use_bias,
        "use_scale": config.use_scale,
        "reduction_axes": None if options.reduction is None else list(options.reduction),
        "axis_name": list(options.axis_name)
        if isinstance(options.axis_name, tuple)
        else options.axis_name,
        "axis_index_groups": None
        if options.axis_index_groups is None
        else [list(group) for group in options.axis_index_groups],
        "use_fast_variance": options.fast,
        "activation": options.activation,
        "implementation": options.implementation,
        "param_dtype": config.param_dtype,
        "trainable": config.trainable,
    }


def config_of(arguments: Any) -> LayerConfig:
    """Return the configuration that arguments make, without any array.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the constructor refuses them, or they are not what `arguments_of` returns.
    """
    if not isinstance(arguments, dict) or arguments.keys() != _NAMES:
        raise ArgumentValueError("its arguments are not those that are written.")
    names = arguments["axis_name"]
    for name in names if isinstance(names, list) else [names]:
        if name is not None and not isinstance(name, str):
            raise ArgumentTypeError(
                f"axis_name={names!r} is of type {type(name).__name__}, and a file holds names "
                "only: use a name, bound by groupnorm.bind_axis in PyTorch, NumPy and CuPy."
            )
    size = arguments["in_size"]
    given = {
        **arguments,
        "in_size": [... if n == "..." else n for n in size] if isinstance(size, list) else size,
    }
    use_bias, use_scale = (flag(name, given.pop(name)) for name in ("use_bias", "use_scale"))
    # Without parameters nothing is allocated: whether the file has as many is checked later.
    layer = GroupNorm(**given, use_bias=False, use_scale=False, backend="numpy")
    config = layer._config._replace(use_bias=use_bias, use_scale=use_scale)
    for dtype in (config.param_dtype, config.options.dtype or ""):
        if dtype not in DTYPES:
            raise ArgumentValueError(f"the dtype {dtype!r} is unknown: it is none of a file.")
    # Written in one way, so 1 is not True, and "float" no dtype's name.
    if json.dumps(arguments_of(config)) != json.dumps({name: arguments[name] for name in _ORDER}):
        raise ArgumentValueError("its arguments are not as they are written.")
    return config


_ORDER = tuple(arguments_of(GroupNorm(1, num_groups=1)._config))
_NAMES = frozenset(_ORDER)
