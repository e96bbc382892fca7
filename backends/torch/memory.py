"""Tensors as kernels read and write them: without gaps, in x's memory order."""

from typing import Any

import torch

from groupnorm.backends.kernels.layout import MemoryLayout
from groupnorm.backends.torch.internals import is_wrapped

__all__ = ["PLAIN", "cotangent", "in_memory", "is_plain", "like"]

# Tensor types that store their values themselves.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(a: Any) -> bool:
    """Whether a value is a strided tensor that stores its values itself."""
    return type(a) in PLAIN and a.layout is torch.strided and not a.is_neg() and not is_wrapped(a)


def in_memory(x: torch.Tensor, layout: MemoryLayout) -> torch.Tensor:
    """Return x, or a copy without gaps."""
    return x if layout.dense else _in_order(x, layout)


def like(x: torch.Tensor, layout: MemoryLayout, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialized tensor with x's memory layout."""
    if layout.dense:
        return torch.empty_like(x, dtype=dtype)
    made = torch.empty(layout.plan.shape, dtype=dtype, device=x.device)
    return made if layout.order is None else made.permute(layout.inverse)


def cotangent(dy: torch.Tensor, x: torch.Tensor, layout: MemoryLayout) -> torch.Tensor:
    """Return dy with x's memory layout, in x's dtype or float32."""
    dy = dy.resolve_neg()
    if dy.dtype is not x.dtype and dy.dtype is not torch.float32:
        dy = dy.to(torch.float32)
    if not layout.dense or dy.stride() != x.stride():
        dy = _in_order(dy, layout)
    return dy


def _in_order(a: torch.Tensor, layout: MemoryLayout) -> torch.Tensor:
    """Return a tensor that is contiguous in x's memory order."""
    if layout.order is not None:
        a = a.permute(layout.order)
    return a.contiguous()
