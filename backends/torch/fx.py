"""Recording calls in torch.fx's symbolic tracing, in which a `Proxy` stands for each tensor."""

from typing import Any

import numpy as np
import torch

from groupnorm.arguments import CallOptions
from groupnorm.portable.inputs import host_mask

__all__ = ["record_call", "record_layer"]


def record_layer(layer: torch.nn.Module, x: torch.fx.Proxy, mask: Any) -> Any:
    """Record a call of the layer as one node, as torch.fx does for PyTorch's own layers.

    If the layer itself is traced, return None.
    """
    tracer: Any = x.tracer
    if tracer.root is layer:
        return None
    arguments = (x,) if mask is None else (x, mask)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, {})


def record_call(
    _: Any, adapter: Any, x: torch.fx.Proxy, scale: Any, bias: Any, mask: Any, options: CallOptions
) -> torch.fx.Proxy:
    """Record a call of the function `group_norm` as one node."""
    from groupnorm.functional import group_norm

    tracer: Any = x.tracer

    def constant(argument: str, value: Any) -> Any:
        """Record a NumPy array, which no graph holds, as a tensor that is moved to x's device."""
        if not isinstance(value, np.ndarray):
            return value
        if argument == "mask":
            value = torch.from_numpy(host_mask(value))
        else:
            value = adapter.from_host(adapter.admit_host(value, argument))
        return tracer.create_proxy("call_method", "to", (value,), {"device": x.device})

    keywords = {
        "num_groups": options.num_groups,
        "group_size": options.group_size,
        "feature_axis": options.feature,
        "reduction_axes": options.reduction,
        "epsilon": options.epsilon,
        "dtype": options.dtype,
        "mask": constant("mask", mask),
        "axis_name": options.axis_name,
        "axis_index_groups": options.axis_index_groups,
        "use_fast_variance": options.fast,
        "activation": options.activation,
        "implementation": options.implementation,
    }
    given = (x, constant("scale", scale), constant("bias", bias))
    made: torch.fx.Proxy = tracer.create_proxy("call_function", group_norm, given, keywords)
    return made
