"""Which engine computes tensors on a device, and binding a call to it."""

from typing import Any

import numpy as np
import torch

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.torch.cpu import CpuEngine
from groupnorm.backends.torch.gpu import GpuEngine
from groupnorm.backends.torch.internals import is_seen_through, is_wrapped
from groupnorm.backends.torch.memory import PLAIN

__all__ = ["Engine", "bind_call", "engine_for"]

Engine = CpuEngine | GpuEngine
_CPU, _GPU = CpuEngine(), GpuEngine()


def engine_for(device: torch.device) -> Engine:
    """Return what computes tensors on a device."""
    return _CPU if device.type == "cpu" else _GPU


def bind_call(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
    """Return the call that a kernel computes, or `Unsupported`."""
    if is_seen_through():
        return Unsupported("PyTorch has to see the individual operations of this computation")
    # Written out, and cheap checks first: this is much of the time of a small call.
    for name, a in (("x", x), ("scale", scale), ("bias", bias)):
        if type(a) in PLAIN:
            if a.layout is not torch.strided or a.is_neg() or is_wrapped(a):
                return Unsupported(f"{name} is no plain tensor")
        elif a is not None and (a is x or type(a) is not np.ndarray):
            return Unsupported(f"{name} is of type {type(a).__name__}")
    return engine_for(x.device).bind(adapter, x, scale, bias, mask, options)
