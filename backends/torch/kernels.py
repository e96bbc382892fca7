"""Eager calls of kernels in PyTorch: bound to an engine, as one autograd function.

When PyTorch must see the individual operations (export, torch.func, forward mode, dispatch modes,
double backward), the portable implementation is used.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from groupnorm.adapter import Kernels, Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.torch.cpu import CpuEngine
from groupnorm.backends.torch.gpu import GpuEngine
from groupnorm.backends.torch.internals import (
    apply_without_transforms,
    is_seen_through,
    is_wrapped,
)
from groupnorm.backends.torch.memory import PLAIN
from groupnorm.portable.group_norm import group_norm, group_norm_vjp
from groupnorm.portable.inputs import check_cotangent
from groupnorm.typing import Gradients

__all__ = ["TorchKernels", "as_parameter", "bind_call", "engine_for"]


class TorchKernels(Kernels):
    """The kernels for CPUs and GPUs, called with tensors.

    Parameters
    ----------
    adapter : Adapter
    traced : callable
        Called instead while torch.compile traces: `custom_op.traced`.
    """

    def __init__(self, adapter: Any, traced: Callable[..., Any]) -> None:
        super().__init__()
        self._adapter, self._traced = adapter, traced

    def why_unavailable(self, device: str) -> Unsupported | None:
        """Return why kernels are unavailable: a CPU needs numba, an NVIDIA GPU Triton."""
        where = torch.device(device)
        return engine_for(where).why_unavailable(where)

    def forward(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y, or `Unsupported`."""
        if torch.compiler.is_compiling():
            return self._traced(self._adapter, x, scale, bias, mask, options)
        call = bind_call(self._adapter, x, scale, bias, mask, options)
        return call if isinstance(call, Unsupported) else _differentiable(call, x, scale, bias)

    def vjp(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y and its pullback, or `Unsupported`."""
        if torch.compiler.is_compiling():
            return Unsupported("torch.compile traces this call")
        call = bind_call(self._adapter, x, scale, bias, mask, options)
        if isinstance(call, Unsupported):
            return call
        return _with_pullback(self._adapter, call, x, scale, bias, mask, options)


# Binding a call -----------------------------------------------------------------------------------

Engine = CpuEngine | GpuEngine
_CPU, _GPU = CpuEngine(), GpuEngine()


def engine_for(device: torch.device) -> Engine:
    """Return the engine for tensors on a device."""
    return _CPU if device.type == "cpu" else _GPU


def bind_call(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
    """Return the call, bound to an engine's kernels, or `Unsupported`."""
    if is_seen_through():
        return Unsupported("PyTorch has to see the individual operations of this computation")
    # Inlined, cheap checks first: this is a large part of the time of a small call.
    for name, a in (("x", x), ("scale", scale), ("bias", bias)):
        if type(a) in PLAIN:
            if a.layout is not torch.strided or a.is_neg() or is_wrapped(a):
                return Unsupported(f"{name} is not a plain tensor")
        elif a is not None and (a is x or type(a) is not np.ndarray):
            return Unsupported(f"{name} is of type {type(a).__name__}")
    return engine_for(x.device).bind(adapter, x, scale, bias, mask, options)


# Differentiating it -------------------------------------------------------------------------------


class _ByKernels(torch.autograd.Function):
    """The kernels forward and backward; double backward uses the portable implementation."""

    @staticmethod
    def forward(ctx: Any, x: Any, scale: Any, bias: Any, call: Any) -> Any:
        y, ctx.saved_statistics = call.forward(x)
        ctx.save_for_backward(x, scale, bias)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        x, scale, bias = ctx.saved_tensors
        call = ctx.call
        if torch.is_grad_enabled() or type(dy) is not torch.Tensor or is_wrapped(dy):
            return (*_portable_gradients(call, (x, scale, bias), ctx.needs_input_grad, dy), None)
        dx, dscale, dbias = call.backward(ctx.saved_statistics, x, dy)
        _, for_scale, for_bias, _ = ctx.needs_input_grad
        return (
            dx,
            as_parameter(dscale, scale) if for_scale else None,
            as_parameter(dbias, bias) if for_bias else None,
            None,
        )


# Tensors of torch.func's transforms never get here.
_apply: Any = apply_without_transforms(_ByKernels)


def _portable_gradients(call: Any, inputs: Any, wanted: Any, dy: Any) -> list[Any]:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = group_norm(call.adapter, inputs[0], inputs[1], inputs[2], call.mask, call.options)
    chosen = [a for a, w in zip(inputs, wanted, strict=False) if w]
    found = iter(torch.autograd.grad(y, chosen, dy, create_graph=create_graph))
    return [next(found) if w else None for _, w in zip(inputs, wanted, strict=False)]


def _differentiable(call: Any, x: Any, scale: Any, bias: Any) -> Any:
    """Compute a bound call; autograd can differentiate the result."""
    if torch.is_grad_enabled() and (
        x.requires_grad or _requires_grad(scale) or _requires_grad(bias)
    ):
        # Host constants are stored in the call; autograd accepts tensors only.
        scale = scale if isinstance(scale, torch.Tensor) else None
        bias = bias if isinstance(bias, torch.Tensor) else None
        return _apply(x, scale, bias, call)
    return call.forward(x)[0]


def _requires_grad(a: Any) -> bool:
    return isinstance(a, torch.Tensor) and a.requires_grad


def _with_pullback(
    adapter: Any, call: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions
) -> Any:
    """Compute a bound call; return y and its pullback."""
    y, saved = call.forward(x)

    def pullback(dy: Any) -> Gradients:
        dy = check_cotangent(adapter, dy, x)
        if is_wrapped(dy):  # torch.func maps or differentiates the pullback
            return group_norm_vjp(adapter, x, scale, bias, mask, options)[1](dy)
        dx, dscale, dbias = call.backward(saved, x, dy)
        return Gradients(dx, as_parameter(dscale, scale), as_parameter(dbias, bias))

    return y, pullback


def as_parameter(gradient: Any, parameter: Any) -> Any:
    """Convert a flat float32 gradient to its parameter's shape and dtype."""
    if parameter is None:
        return None
    found = gradient if parameter.ndim == 1 else gradient.reshape(parameter.shape)
    if parameter.dtype == torch.float32:
        return found
    if isinstance(parameter, torch.Tensor):
        return found.to(parameter.dtype)
    return found.to(getattr(torch, parameter.dtype.name))
