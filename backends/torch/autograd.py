"""Eager calls of the kernels: forward and backward as one function of autograd.

When PyTorch must see the individual operations (export, torch.func, forward mode, dispatch modes,
double backward), the portable implementation is used.
"""

from typing import Any

import torch

from groupnorm.arguments import CallOptions
from groupnorm.backends.torch.internals import apply_without_transforms, is_wrapped
from groupnorm.portable.group_norm import group_norm, group_norm_vjp
from groupnorm.portable.inputs import check_cotangent
from groupnorm.typing import Gradients

__all__ = ["as_parameter", "differentiable", "with_pullback"]


class _ByKernels(torch.autograd.Function):
    """The kernels forward and backward; derivatives of the gradient are those of portable code."""

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


# No tensor of torch.func's transforms gets here.
_apply: Any = apply_without_transforms(_ByKernels)


def _portable_gradients(call: Any, inputs: Any, wanted: Any, dy: Any) -> list[Any]:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = group_norm(call.adapter, inputs[0], inputs[1], inputs[2], call.mask, call.options)
    chosen = [a for a, w in zip(inputs, wanted, strict=False) if w]
    found = iter(torch.autograd.grad(y, chosen, dy, create_graph=create_graph))
    return [next(found) if w else None for _, w in zip(inputs, wanted, strict=False)]


def differentiable(call: Any, x: Any, scale: Any, bias: Any) -> Any:
    """Return y of a bound call, which autograd can differentiate."""
    if torch.is_grad_enabled() and (
        x.requires_grad or _requires_grad(scale) or _requires_grad(bias)
    ):
        # Constants from the host are in the call; autograd takes tensors only.
        scale = scale if isinstance(scale, torch.Tensor) else None
        bias = bias if isinstance(bias, torch.Tensor) else None
        return _apply(x, scale, bias, call)
    return call.forward(x)[0]


def _requires_grad(a: Any) -> bool:
    return isinstance(a, torch.Tensor) and a.requires_grad


def with_pullback(
    adapter: Any, call: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions
) -> Any:
    """Return y of a bound call, and its pullback."""
    y, saved = call.forward(x)

    def pullback(dy: Any) -> Gradients:
        check_cotangent(adapter, dy, x)
        if is_wrapped(dy):  # torch.func maps or differentiates the pullback
            return group_norm_vjp(adapter, x, scale, bias, mask, options)[1](dy)
        dx, dscale, dbias = call.backward(saved, x, dy)
        return Gradients(dx, as_parameter(dscale, scale), as_parameter(dbias, bias))

    return y, pullback


def as_parameter(gradient: Any, parameter: Any) -> Any:
    """Return a parameter's gradient, given flat in float32, in its shape and dtype."""
    if parameter is None:
        return None
    found = gradient if parameter.ndim == 1 else gradient.reshape(parameter.shape)
    if parameter.dtype == torch.float32:
        return found
    if isinstance(parameter, torch.Tensor):
        return found.to(parameter.dtype)
    return found.to(getattr(torch, parameter.dtype.name))
