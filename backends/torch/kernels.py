"""PyTorch's kernels: which engine computes on a device, for eager and for compiled calls."""

from typing import Any

import numpy as np
import torch

from groupnorm.adapter import Kernels, Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.torch.autograd import differentiable, with_pullback
from groupnorm.backends.torch.cpu import CpuEngine
from groupnorm.backends.torch.gpu import GpuEngine
from groupnorm.backends.torch.internals import is_seen_through, is_wrapped
from groupnorm.backends.torch.memory import PLAIN

__all__ = ["Engine", "TorchKernels", "bind_call", "engine_for"]

Engine = CpuEngine | GpuEngine
_CPU, _GPU = CpuEngine(), GpuEngine()


def engine_for(device: torch.device) -> Engine:
    """Return what computes tensors on a device."""
    return _CPU if device.type == "cpu" else _GPU


class TorchKernels(Kernels):
    """The kernels for CPUs and GPUs, as functions of autograd or as operators of a program."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self._adapter = adapter

    def why_unavailable(self, device: str) -> Unsupported | None:
        """Return why there are none: numba is missing on a CPU, or Triton on an NVIDIA GPU."""
        where = torch.device(device)
        return engine_for(where).why_unavailable(where)

    def forward(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y, or `Unsupported`."""
        if torch.compiler.is_compiling():
            # Here, since registering operators takes a while.
            from groupnorm.backends.torch.custom_op import traced

            return traced(self._adapter, x, scale, bias, mask, options)
        call = bind_call(self._adapter, x, scale, bias, mask, options)
        return call if isinstance(call, Unsupported) else differentiable(call, x, scale, bias)

    def vjp(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y and its pullback, or `Unsupported`."""
        if torch.compiler.is_compiling():
            return Unsupported("torch.compile traces this")
        call = bind_call(self._adapter, x, scale, bias, mask, options)
        if isinstance(call, Unsupported):
            return call
        return with_pullback(self._adapter, call, x, scale, bias, mask, options)


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
