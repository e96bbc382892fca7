"""Have the group normalizations of existing PyTorch models computed by this library."""

import copy
from typing import Any

from groupnorm.carrying import channels_of
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.imports import needs
from groupnorm.layer import GroupNorm

with needs("torch", "groupnorm.torch"):
    from groupnorm.backends.torch.fusion import fused, register_fusion
    from groupnorm.backends.torch.layer import check_hooks
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
    "fused",
    "layer_of",
    "module_of",
    "override",
    "register_fusion",
    "register_replacement",
    "replace",
    "restore",
    "sum_gradients",
]


def layer_of(module: Any) -> Any:
    """Return a layer equal to a module that `replace` knows."""
    try:
        one = copy.deepcopy(module)
    except RuntimeError as error:  # of tensors that were computed, as by pruning
        raise ArgumentValueError(
            f"layer={type(module).__name__} cannot be copied ({error}): make its parameters "
            "ordinary ones first, such as by torch.nn.utils.prune.remove."
        ) from error
    report = replace(one, also=type(module), fuse=False)
    reasons = [entry.note for entry in report if "" in entry.names]
    if not isinstance(one, GroupNorm):
        raise ArgumentTypeError(
            f"layer is of type {type(module).__name__}, which is no group norm that can be "
            f"carried{''.join(f' ({reason})' for reason in reasons)}: pass a torch.nn.GroupNorm, "
            "or a module for which groupnorm.torch.register_replacement was called."
        )
    check_hooks(module)
    return one.to_backend("torch")


def module_of(layer: Any) -> Any:
    """Return the layer as a module, which is a `torch.nn.GroupNorm`."""
    if layer._options.feature != (1,):  # but that of inputs with as many axes as in_size
        size = (channels_of(layer), ...)
        layer = layer._with(in_size=size, feature_axis=0, dtype=layer.dtype)
    return layer.to_backend("torch")
