"""Tensors as kernels read and write them: without gaps, in x's memory order.

What a kernel reads, forward or backward, has passed `is_plain`: a kernel takes addresses, so it
must read neither memory that was freed nor a tensor whose values are somewhere else.
"""

from typing import Any

import torch

from groupnorm.backends.kernels.layout import MemoryLayout
from groupnorm.backends.torch.internals import SPECIAL_KEYS, dispatch_keys, has_memory
from groupnorm.errors import ArgumentStateError

__all__ = [
    "PLAIN",
    "check_memory",
    "cotangent",
    "in_memory",
    "is_plain",
    "is_plain_mask",
    "like",
    "without_base",
]

# Tensor types that store their values themselves.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(a: Any, argument: str) -> bool:
    """Whether a value is a tensor whose values are those in its memory.

    Raises
    ------
    ArgumentStateError
        If that memory was freed.
    """
    if type(a) not in PLAIN or dispatch_keys(a).raw_repr() & SPECIAL_KEYS:
        return False
    # Inlined: whether a tensor that begins with its storage fits into it.
    size = a.numel() * a.itemsize  # not `nbytes`, which fails in dynamo's frames
    if a.untyped_storage().nbytes() < size or a.storage_offset() or not a.is_contiguous():
        _check_storage(a, argument)
    return True


_MASKS = frozenset({
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64,
})  # fmt: skip


def is_plain_mask(a: torch.Tensor) -> bool:
    """Whether a tensor is plain, and of a dtype that PyTorch can compare with zero."""
    return a.dtype in _MASKS and is_plain(a, "mask")


def check_memory(a: torch.Tensor, argument: str) -> None:
    """Raise `ArgumentStateError` if a tensor, of any kind, has memory that was freed."""
    if has_memory(a):
        _check_storage(a, argument)


def _check_storage(a: torch.Tensor, argument: str) -> None:
    if a.is_contiguous() or (
        a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last)
    ):  # fmt: skip
        elements = a.storage_offset() + a.numel()
    else:
        last = sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True))
        elements = a.storage_offset() + 1 + last
    held = a.untyped_storage().nbytes()
    if held < elements * a.itemsize and a.numel():
        raise ArgumentStateError(
            f"{argument} has shape {tuple(a.shape)} and needs {elements * a.itemsize} bytes, and "
            f"its storage has {held}: its memory was freed, as sharding and offloading do. "
            "Restore the storage before the call."
        )


def in_memory(x: torch.Tensor, layout: MemoryLayout) -> torch.Tensor:
    """Return a tensor of x's shape in memory order without gaps: itself or a copy."""
    if layout.dense and x.stride() == layout.strides:
        return x
    if layout.order is not None:
        x = x.permute(layout.order)
    return x.contiguous()


def like(x: torch.Tensor, layout: MemoryLayout, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialized tensor of x's shape, on its device, with the memory layout."""
    if layout.dense:
        if dtype is x.dtype:  # takes two thirds of the time of passing the dtype and device
            return x.new_empty_strided(layout.shape, layout.strides)
        return torch.empty_strided(layout.shape, layout.strides, dtype=dtype, device=x.device)
    made = torch.empty(layout.plan.shape, dtype=dtype, device=x.device)
    return made if layout.order is None else without_base(made.permute(layout.inverse))


def without_base(y: torch.Tensor) -> torch.Tensor:
    """Return a new tensor as one that is no view: a caller may change his result in place.

    Autograd forbids that for a view made by one of its functions, or without gradients.
    """
    return y.data if y._is_view() else y


def cotangent(dy: torch.Tensor, x: torch.Tensor, layout: MemoryLayout) -> torch.Tensor:
    """Return dy in memory order without gaps, in x's dtype or float32."""
    if dy.dtype is not x.dtype and dy.dtype is not torch.float32:
        dy = dy.to(torch.float32)
    return in_memory(dy, layout)
