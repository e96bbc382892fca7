"""PyTorch's own group normalization, for ``implementation="native"``."""

from typing import Any

import torch

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.torch.differentiation import requires_grad
from groupnorm.backends.torch.internals import is_transformed

__all__ = ["functional", "is_autocast_to_float32", "laid_out_as_pytorch"]


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_autocast_to_float32(x: Any) -> bool:
    """Whether autocast makes the result of PyTorch's own group normalization of x float32.

    So it is on CUDA devices; on a CPU the result has x's dtype.
    """
    half = x.dtype is torch.float16 or x.dtype is torch.bfloat16
    return half and x.is_cuda and torch.is_autocast_enabled("cuda")


def laid_out_as_pytorch(y: Any) -> Any:
    """Return a result in the memory order that PyTorch's own has: contiguous or channels last."""
    if type(y) is not torch.Tensor or y.is_contiguous():
        return y
    if not torch.compiler.is_compiling() and is_transformed():
        return y  # under vmap, a tensor does not tell its memory format
    last = _CHANNELS_LAST.get(y.ndim)
    if last is not None and y.is_contiguous(memory_format=last):
        return y
    return y.contiguous()


def functional(x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
    """Return what `torch.nn.functional.group_norm` computes, or `Unsupported`."""
    channels = x.shape[1] if x.ndim > 1 else 0
    own = (
        mask is None
        and options.axis_name is None
        and options.reduction is None
        and tuple(a % max(x.ndim, 1) for a in options.feature) == (1,)
        and channels > 0
    )
    if not own:
        return Unsupported(
            "torch.nn.functional.group_norm needs its channels on axis 1 and supports no mask, "
            "reduction_axes or axis_name"
        )
    if options.dtype not in (None, "input"):
        return Unsupported("torch.nn.functional.group_norm keeps x's dtype")
    groups = options.num_groups or channels // (options.group_size or 1)
    last = _CHANNELS_LAST.get(x.ndim)
    # In this order, PyTorch's backward would end the process if x needs no gradient (2.13).
    copied = (
        last is not None
        and requires_grad(scale, bias)
        and not x.requires_grad
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=last)
    )
    if copied:
        x = x.contiguous()
    try:
        # Not the function of torch.nn.functional, which `groupnorm.torch.override` replaces.
        y = torch.group_norm(x, groups, scale, bias, options.epsilon)
        if copied:
            y = y.contiguous(memory_format=_CHANNELS_LAST[x.ndim])
    except (RuntimeError, TypeError, ValueError) as error:
        return Unsupported(f"torch.nn.functional.group_norm raised: {error}")
    return y if options.activation is None else getattr(torch.nn.functional, options.activation)(y)
