"""Have the group normalizations of existing PyTorch models computed by this library."""

import copy
from typing import Any

from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.imports import needs

with needs("torch", "groupnorm.torch"):
    from groupnorm.backends.torch.fusion import fused, register_fusion
    from groupnorm.backends.torch.override import override
    from groupnorm.backends.torch.process_groups import sum_gradients
    from groupnorm.backends.torch.replacement import (
        Replacement,
        register_replacement,
        replace,
        restore,
    )
    from groupnorm.backends.torch.report import Entry, Report

__all__ = [
    "Entry",
    "Replacement",
    "Report",
    "arguments_of",
    "fused",
    "module_of",
    "override",
    "register_fusion",
    "register_replacement",
    "replace",
    "restore",
    "sum_gradients",
]


def arguments_of(module: Any, params: Any = None) -> dict[str, Any]:
    """Return the arguments of a layer equal to a module that `replace` knows."""
    if params is not None:
        raise ArgumentTypeError("params is given, and modules of PyTorch hold their parameters.")
    one = copy.deepcopy(module)
    replace(one, also=type(module), fuse=False, on_unknown="raise")
    if not hasattr(one, "_config"):
        raise ArgumentTypeError(
            f"layer is of type {type(module).__name__}, which is no group norm of PyTorch: pass a "
            "torch.nn.GroupNorm, or a module for which register_replacement was called."
        )
    if getattr(one, "_then", ()):
        raise ArgumentValueError(
            f"layer={type(module).__name__} also computes what follows its normalization: use "
            "groupnorm.torch.replace, which keeps that."
        )
    names = ("in_size", "feature_axis", "num_groups", "epsilon", "dtype", "reduction_axes")
    return {
        **{name: getattr(one, name) for name in names},
        "scale": one.weight if one.weight is None else one.scale,
        "bias": one.bias,
        "trainable": one.trainable,
        "backend": "torch",
    }


def module_of(layer: Any) -> Any:
    """Return the layer as a module, which is a `torch.nn.GroupNorm`."""
    return layer.to_backend("torch")
