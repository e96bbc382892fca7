"""PyTorch's kernels: as functions of autograd for eager calls, as operators for compiled ones."""

from typing import Any

import torch

from groupnorm.adapter import Kernels, Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.torch import engines
from groupnorm.backends.torch.autograd import differentiable, with_pullback
from groupnorm.backends.torch.engines import bind_call

__all__ = ["TorchKernels"]


class TorchKernels(Kernels):
    """The kernels for CPUs and GPUs."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self._adapter = adapter

    def why_unavailable(self, device: str) -> Unsupported | None:
        """Return why there are none: numba is missing on a CPU, or Triton on an NVIDIA GPU."""
        where = torch.device(device)
        return engines.engine_for(where).why_unavailable(where)

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
