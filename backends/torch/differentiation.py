"""The portable implementation as one autograd function.

So the portable implementation saves the same tensors as the kernels, and activation checkpointing
works if only one of forward and recomputation is computed by kernels. Its backward pass is the
explicit pullback, whose sums, unlike those of autograd, do not depend on the number of threads.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from groupnorm.arguments import CallOptions
from groupnorm.backends.torch.internals import (
    apply_without_transforms,
    has_memory,
    in_forward_mode,
    is_traced,
    is_transformed,
)
from groupnorm.backends.torch.memory import PLAIN, check_memory, without_base
from groupnorm.portable.group_norm import gradients, group_norm, group_norm_measured, group_norm_vjp
from groupnorm.portable.inputs import HOST_MASKS, host_mask
from groupnorm.typing import Gradients

__all__ = ["Constants", "constants", "portable", "portable_gradients", "requires_grad"]


class Constants(NamedTuple):
    """Parameters that are arrays of the host; copies, since the caller may change his in place."""

    scale: "np.ndarray[Any, Any] | None"
    bias: "np.ndarray[Any, Any] | None"

    def over(self, scale: Any, bias: Any) -> tuple[Any, Any]:
        """Return the parameters, of which autograd saved those that are tensors."""
        return self.scale if scale is None else scale, self.bias if bias is None else bias


def constants(scale: Any, bias: Any) -> Constants:
    """Return the parameters that autograd cannot save."""
    return Constants(*(a.copy() if isinstance(a, np.ndarray) else None for a in (scale, bias)))


def requires_grad(*arrays: Any) -> bool:
    """Whether autograd records operations on these arrays; some may be None, or of the host."""
    if torch.is_grad_enabled():
        for a in arrays:  # a generator would take as long as a small allocation
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return False


def portable(
    adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions
) -> Any:  # fmt: skip
    """Call the portable implementation, as one function for autograd if possible.

    Tracers, forward mode and torch.func's transforms must see the operations; so must compilers,
    under which this is not called.
    """
    if (
        not requires_grad(x, scale, bias)
        or is_traced()
        or in_forward_mode()
        or is_transformed()
        or not all(_is_savable(a, np.ndarray) for a in (x, scale, bias))
        or not _is_savable(mask, HOST_MASKS)
    ):
        y = group_norm(adapter, x, scale, bias, mask, options)
        recorded = is_traced() or torch.is_grad_enabled()
        return y if recorded or not _is_savable(y, ()) else without_base(y)
    if isinstance(mask, torch.Tensor):
        check_memory(mask, "mask")
        mask = mask.detach().clone()
    elif mask is not None:
        mask = host_mask(mask)  # a copy
    call = _Call(adapter, mask, options, constants(scale, bias))
    tensors = (a if isinstance(a, torch.Tensor) else None for a in (x, scale, bias))
    return _apply(*tensors, call)


class _Call(NamedTuple):
    """What the backward pass needs besides the tensors that autograd saves."""

    adapter: Any
    mask: Any
    options: CallOptions
    constants: Constants


class _ByPullback(torch.autograd.Function):
    """The portable implementation; it saves no array of the size of x but x itself."""

    @staticmethod
    def forward(ctx: Any, x: Any, scale: Any, bias: Any, call: Any) -> Any:
        ctx.save_for_backward(x, scale, bias)
        ctx.call, ctx.like = call, (x.dtype, x.device)
        scale, bias = call.constants.over(scale, bias)
        y, ctx.measured = group_norm_measured(
            call.adapter, x, scale, bias, call.mask, call.options
        )  # fmt: skip
        return without_base(y)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (dy,), call = cotangents, ctx.call
        saved = x, scale, bias = ctx.saved_tensors
        scale, bias = call.constants.over(scale, bias)
        given = (call.adapter, x, scale, bias, call.mask, call.options, dy)
        measured = ctx.measured
        # Hooks may return another x than the one that was measured; other kinds of tensors, and
        # recorded operations, must not overwrite arrays.
        if (
            x.shape == dy.shape
            and (x.dtype, x.device) == ctx.like
            and not torch.is_grad_enabled()
            and not in_forward_mode()
            and all(_is_savable(a, np.ndarray) for a in (x, scale, bias, dy))
        ):
            if not ctx.needs_input_grad[0]:  # dx alone depends on the sums of the other replicas
                measured = measured._replace(replicas=None)
            found = gradients(*given, measured)
        else:
            found = portable_gradients(*given, measured.replicas)
        wanted = zip(found, saved, ctx.needs_input_grad, strict=False)
        return *(g if a is not None and needed else None for g, a, needed in wanted), None


_apply: Any = apply_without_transforms(_ByPullback)


def portable_gradients(
    adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions, dy: Any,
    replicas: Any = None,
) -> Gradients:  # fmt: skip
    """Return the gradients by portable code, which autograd can differentiate again."""
    return group_norm_vjp(adapter, x, scale, bias, mask, options, replicas)[1](dy)


def _is_savable(a: Any, host: Any) -> bool:
    """Whether a is an ordinary tensor, of one of the types of the host, or None."""
    if isinstance(a, torch.Tensor):
        return type(a) in PLAIN and has_memory(a)
    return a is None or isinstance(a, host)
