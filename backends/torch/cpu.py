"""Calling the CPU kernels with tensors, directly in their memory."""

from typing import Any, NamedTuple

import numpy as np
import torch

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.binding import bind
from groupnorm.backends.kernels.cpu import availability
from groupnorm.backends.kernels.cpu.launch import Arrays, Work, planned
from groupnorm.backends.kernels.layout import MemoryLayout, flat_mask, unflat_mask
from groupnorm.backends.torch.memory import cotangent, in_memory, is_plain, is_plain_mask, like
from groupnorm.backends.torch.openmp import TORCH_THREADS
from groupnorm.portable.inputs import HOST_MASKS, host_mask

__all__ = ["Call", "CpuEngine"]


class Call(NamedTuple):
    """A call bound to a kernel."""

    adapter: Any
    options: CallOptions
    work: Work
    mask: Any  # as `layout.flat_mask` returns it
    scale: Any  # float32, a tensor or a NumPy array
    bias: Any
    rows: bool  # whether scale and bias have a row for each sample

    def with_parameters(self, x: torch.Tensor, scale: Any, bias: Any) -> "Call | Unsupported":
        """Return the call with other parameters; all tensors must be plain ones."""
        if self._reads(scale, self.scale) and self._reads(bias, self.bias):  # mostly
            return self
        bound = bind(self.work, scale, bias, None, _flat_mask, _flat_parameter)
        if isinstance(bound, Unsupported):
            return bound
        return self._replace(scale=bound.scale, bias=bound.bias, rows=bound.rows)

    def _reads(self, given: Any, bound: Any) -> bool:
        """Whether what the kernel reads is the given parameter, as it is now.

        A tensor may be the same object and hold other memory, of another shape and dtype, that was
        assigned to its `data`.
        """
        if given is None:
            return True
        return (
            given is bound
            and given.dtype is torch.float32
            and given.is_contiguous()
            and given.shape in (self.work.row_shapes if self.rows else self.work.parameter_shapes)
        )

    def broadcastable_mask(self) -> Any:
        """Return the mask as it was at the call, broadcastable to x; None without a mask."""
        return None if self.mask is None else unflat_mask(self.mask.view(bool), self.work.layout)

    def forward(self, x: torch.Tensor, *, keep: bool = True) -> tuple[torch.Tensor, Any]:
        """Return y, which has x's memory layout, and the statistics for backward."""
        work = self.work
        y = like(x, work.layout, work.dtypes.result_dtype)
        if not work.layout.dense:
            x = in_memory(x, work.layout)
        return y, work.forward(self._arrays(x), y.data_ptr(), rows=self.rows, keep=keep)

    def backward(
        self, saved: Any, x: torch.Tensor, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dx, and the gradients of scale and bias, flat in float32."""
        work, dy = self.work, cotangent(dy, x, self.work.layout)
        dx = like(x, work.layout, x.dtype)
        x = in_memory(x, work.layout)
        size = work.gradient_rows(rows=self.rows) * work.channels
        dscale = torch.empty(size, dtype=torch.float32, device="cpu")
        dbias = torch.empty_like(dscale)
        dy_dtype = "float32" if dy.dtype is torch.float32 else work.dtypes.x
        work.backward(
            saved, self._arrays(x), dy.data_ptr(), dy_dtype, dx.data_ptr(), dscale.data_ptr(),
            dbias.data_ptr(), rows=self.rows,
        )  # fmt: skip
        return dx, dscale, dbias

    def packed(self, saved: Any) -> torch.Tensor:
        """Return the saved statistics in a tensor, after a number for the memory order."""
        values = np.frombuffer(saved)
        return torch.from_numpy(np.concatenate([[_signature(self.work.layout)], values]))

    def unpacked(self, packed: torch.Tensor) -> Any:
        """Return the statistics that were packed, or None if they have another memory order."""
        layout = self.work.layout
        size = 1 + 3 * layout.grouped.samples * layout.grouped.groups
        ours = packed.is_cpu and packed.dtype is torch.float64 and packed.shape == (size,)
        if not ours or not is_plain(packed, "saved"):
            return None
        values = packed.detach().contiguous().numpy()
        return values[1:] if values[0] == _signature(layout) else None

    def _arrays(self, x: torch.Tensor) -> Arrays:
        return Arrays(x.data_ptr(), _readable(self.scale), _readable(self.bias), self.mask)


class CpuEngine:
    """The CPU kernels, run by PyTorch's threads."""

    def why_unavailable(self, device: torch.device) -> Unsupported | None:
        """Return why CPU kernels are unavailable here; None if they are available."""
        return availability.why_unavailable()

    def bind(
        self, adapter: Any, x: torch.Tensor, scale: Any, bias: Any, mask: Any, options: CallOptions
    ) -> Call | Unsupported:
        """Return the bound call; all tensors must be plain ones."""
        for parameter in (scale, bias):
            if isinstance(parameter, torch.Tensor) and not parameter.is_cpu:
                return Unsupported("a parameter is on a different device than x")
        work = planned(
            adapter, x.shape, x.stride(), x.dtype, None if scale is None else scale.dtype,
            None if bias is None else bias.dtype, options, TORCH_THREADS,
        )  # fmt: skip
        bound = bind(work, scale, bias, mask, _flat_mask, _flat_parameter)
        if isinstance(bound, Unsupported):
            return bound
        return Call(adapter, options, bound.work, bound.mask, bound.scale, bound.bias, bound.rows)

    def nothing_saved(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """Return a tensor of the size of `Call.packed` that stands for no saved statistics."""
        return torch.zeros(1 + 3 * groups, dtype=torch.float64)


def _flat_parameter(parameter: Any) -> Any:
    """Return a parameter as contiguous float32, without a copy if it is already."""
    if parameter is None:
        return None
    if not isinstance(parameter, torch.Tensor):
        return np.array(parameter, np.float32, order="C")  # the caller may change his in place
    if parameter.dtype is torch.float32 and parameter.is_contiguous():
        return parameter
    return parameter.detach().to(torch.float32).contiguous()


def _flat_mask(mask: Any, work: Work) -> Any:
    if isinstance(mask, torch.Tensor):
        if not is_plain_mask(mask) or not mask.is_cpu:
            return Unsupported("the mask is not a plain tensor of real numbers on the CPU")
        return flat_mask((mask.detach() != 0).numpy(), work.layout)
    if not isinstance(mask, HOST_MASKS):
        return Unsupported("the mask is an array of another library")
    return flat_mask(host_mask(mask), work.layout)


def _signature(layout: MemoryLayout) -> float:
    """Return a nonzero number that identifies an order of axes."""
    ndim = len(layout.shape)
    order = range(ndim) if layout.order is None else layout.order
    return float(1 + sum(a * ndim**i for i, a in enumerate(order)))


def _readable(parameter: Any) -> Any:
    """Return what kernels read: a tensor's address, an array or None."""
    return parameter.data_ptr() if isinstance(parameter, torch.Tensor) else parameter
