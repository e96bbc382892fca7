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
from groupnorm.backends.kernels.variants import DTYPES
from groupnorm.backends.torch.cpu import CpuEngine
from groupnorm.backends.torch.differentiation import (
    Constants,
    constants,
    portable_gradients,
    requires_grad,
)
from groupnorm.backends.torch.gpu import GpuEngine
from groupnorm.backends.torch.internals import apply_without_transforms, is_seen_through
from groupnorm.backends.torch.memory import check_memory, is_plain
from groupnorm.errors import ArgumentStateError
from groupnorm.portable.inputs import check_cotangent
from groupnorm.typing import Gradients

__all__ = ["TorchKernels", "as_parameter", "bind_again", "bind_call", "engine_for"]


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
        """Return why there are none: a CPU needs the compiled core, an NVIDIA GPU Triton."""
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
        return _with_pullback(call, x, scale, bias)


# Binding a call -----------------------------------------------------------------------------------

Engine = CpuEngine | GpuEngine
_CPU, _GPU = CpuEngine(), GpuEngine()


def engine_for(device: torch.device) -> Engine:
    """Return the engine for tensors on a device."""
    return _CPU if device.type == "cpu" else _GPU


def bind_call(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
    """Return the call, bound to an engine's kernels, or `Unsupported`.

    Raises
    ------
    ArgumentStateError
        If the memory of a tensor was freed.
    """
    if is_seen_through():
        return Unsupported("PyTorch has to see the individual operations of this computation")
    why = _why_not_plain(x, scale, bias)
    if why is not None:
        return why
    return engine_for(x.device).bind(adapter, x, scale, bias, mask, options)


def bind_again(call: Any, x: Any, scale: Any, bias: Any, dy: Any) -> Any:
    """Return the call with the parameters of its backward pass, or `Unsupported`.

    Hooks may return other tensors than those that were saved. Raises as `bind_call`.
    """
    if is_seen_through():
        return Unsupported("PyTorch has to see the individual operations of this computation")
    why = _why_not_plain(x, scale, bias)
    if why is not None:
        return why
    if not is_plain(dy, "dy"):
        return _not_plain("dy", dy)
    work = call.work
    shape = work.layout.shape
    if x.shape != shape or dy.shape != shape or x.dtype is not _DTYPES[work.dtypes.x]:
        return Unsupported("x or dy has another shape or dtype than in the forward pass")
    device = dy.get_device()  # autograd checked that it is that of y
    for name, a in (("x", x), ("scale", scale), ("bias", bias)):
        if isinstance(a, torch.Tensor) and a.get_device() != device:
            return Unsupported(f"{name} is on another device than y")
    return call.with_parameters(x, scale, bias)


_DTYPES = {name: getattr(torch, name) for name in DTYPES}


def _why_not_plain(x: Any, scale: Any, bias: Any) -> Unsupported | None:
    """Return which of them kernels cannot read, if any; parameters may be arrays of NumPy."""
    # Without a loop: this is a large part of the time of a small call.
    if not is_plain(x, "x"):
        return _not_plain("x", x)
    if not (scale is None or is_plain(scale, "scale") or type(scale) is np.ndarray):
        return _not_plain("scale", scale)
    if not (bias is None or is_plain(bias, "bias") or type(bias) is np.ndarray):
        return _not_plain("bias", bias)
    return None


def _not_plain(argument: str, a: Any) -> Unsupported:
    kind = type(a).__name__
    if isinstance(a, torch.Tensor):
        kind = f"{kind} ({a.layout}, {a.device.type})"
    return Unsupported(f"{argument} is not a plain tensor, but {kind}")


# Differentiating it -------------------------------------------------------------------------------


class _ByKernels(torch.autograd.Function):
    """The kernels forward and backward; double backward uses the portable implementation."""

    @staticmethod
    def forward(ctx: Any, x: Any, scale: Any, bias: Any, call: Any, kept: Any) -> Any:
        y, ctx.saved_statistics = call.forward(x)
        ctx.save_for_backward(x, scale, bias)
        ctx.call, ctx.constants = call, kept
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,), call = gradients, ctx.call
        x, scale, bias = ctx.saved_tensors
        wants_scale, wants_bias = scale is not None, bias is not None
        if ctx.constants is not _NO_CONSTANTS:
            scale, bias = ctx.constants.over(scale, bias)
        dx, dscale, dbias = _gradients(
            call, ctx.saved_statistics, x, scale, bias, dy, graph=torch.is_grad_enabled()
        )
        return dx, dscale if wants_scale else None, dbias if wants_bias else None, None, None


# Tensors of torch.func's transforms never get here.
_apply: Any = apply_without_transforms(_ByKernels)
_NO_CONSTANTS = Constants(None, None)


def _gradients(
    call: Any, saved: Any, x: Any, scale: Any, bias: Any, dy: Any, *, graph: bool
) -> Gradients:
    """Return the gradients; by portable code if autograd needs their graph."""
    if not graph and dy.is_neg():
        check_memory(dy, "dy")
        dy = dy.resolve_neg()
    again = None if graph else bind_again(call, x, scale, bias, dy)
    if again is None or isinstance(again, Unsupported):
        mask = call.broadcastable_mask()
        return portable_gradients(call.adapter, x, scale, bias, mask, call.options, dy)
    dx, dscale, dbias = again.backward(saved, x, dy)
    return Gradients(dx, as_parameter(dscale, scale), as_parameter(dbias, bias))


def _differentiable(call: Any, x: Any, scale: Any, bias: Any) -> Any:
    """Compute a bound call; autograd can differentiate the result."""
    if not requires_grad(x, scale, bias):
        return call.forward(x, keep=False)[0]
    # Autograd saves tensors only.
    kept = _NO_CONSTANTS
    if isinstance(scale, np.ndarray) or isinstance(bias, np.ndarray):
        kept = constants(scale, bias)
        scale, bias = (a if isinstance(a, torch.Tensor) else None for a in (scale, bias))
    return _apply(x, scale, bias, call, kept)


def _with_pullback(call: Any, x: Any, scale: Any, bias: Any) -> Any:
    """Compute a bound call; return y and its pullback."""
    adapter, graph = call.adapter, requires_grad(x, scale, bias)
    y, saved = (_differentiable(call, x, scale, bias), None) if graph else call.forward(x)
    # The caller may change parameters in place before the pullback, but not x.
    scale, bias = (
        a if a is None else a.clone() if isinstance(a, torch.Tensor) else a.copy()
        for a in (scale, bias)
    )  # fmt: skip
    version = None if x.is_inference() else x._version

    def pullback(dy: Any) -> Gradients:
        dy = check_cotangent(adapter, dy, x)
        if version is not None and x._version != version:
            raise ArgumentStateError(
                f"x, of shape {tuple(x.shape)}, was changed in place between group_norm_vjp and "
                "its pullback, which needs the values of the forward pass. Pass x.clone()."
            )
        return _gradients(
            call, saved, x, scale, bias, dy, graph=saved is None or requires_grad(dy)
        )  # fmt: skip

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
