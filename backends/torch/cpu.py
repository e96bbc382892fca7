"""Calling the CPU kernels with tensors, directly in their memory."""

from typing import Any, NamedTuple

import numpy as np
import torch

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.binding import bind
from groupnorm.backends.kernels.cpu import availability
from groupnorm.backends.kernels.cpu.huge_pages import WORTH, want_large_pages
from groupnorm.backends.kernels.cpu.launch import Arrays, Saved, ThreadTeam, Work, address, planned
from groupnorm.backends.kernels.layout import MemoryLayout, flat_mask, unflat_mask
from groupnorm.backends.torch.memory import cotangent, in_memory, is_plain, is_plain_mask, like
from groupnorm.backends.torch.openmp import run_in_torch_threads, torch_helpers_for
from groupnorm.portable.inputs import HOST_MASKS, host_mask

__all__ = ["Call", "CpuEngine"]

_TEAM = ThreadTeam(torch_helpers_for, run_in_torch_threads)


class Call(NamedTuple):
    """A call bound to a kernel."""

    adapter: Any
    options: CallOptions
    work: Work
    mask: Any  # as `layout.flat_mask` returns it
    scale: Any  # float32, a tensor or a NumPy array
    bias: Any

    def with_parameters(self, x: torch.Tensor, scale: Any, bias: Any) -> "Call | Unsupported":
        """Return the call with other parameters; all tensors must be plain ones."""
        if self._reads(scale, self.scale) and self._reads(bias, self.bias):  # mostly
            return self
        bound = bind(self.work, scale, bias, None, _flat_mask, _flat_parameter)
        if isinstance(bound, Unsupported):
            return bound
        return Call(self.adapter, self.options, self.work, self.mask, bound.scale, bound.bias)

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
            and given.shape in self.work.parameter_shapes
        )

    def broadcastable_mask(self) -> Any:
        """Return the mask as it was at the call, broadcastable to x; None without a mask."""
        return None if self.mask is None else unflat_mask(self.mask.view(bool), self.work.layout)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """Return y, which has x's memory layout, and the statistics for backward."""
        work = self.work
        y = like(x, work.layout, work.dtypes.result_dtype)
        if not work.layout.dense:
            x = in_memory(x, work.layout)
        return y, work.forward(self._arrays(x), _fresh(y), (self, x, y))

    def backward(
        self, saved: Saved, x: torch.Tensor, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dx, and the gradients of scale and bias, flat in float32."""
        work, dy = self.work, cotangent(dy, x, self.work.layout)
        dx = like(x, work.layout, x.dtype)
        x = in_memory(x, work.layout)
        dscale = torch.empty(work.channels, dtype=torch.float32, device="cpu")
        dbias = torch.empty_like(dscale)
        dy_dtype = "float32" if dy.dtype is torch.float32 else work.dtypes.x
        work.backward(
            saved, self._arrays(x), dy.data_ptr(), dy_dtype, _fresh(dx), dscale.data_ptr(),
            dbias.data_ptr(), (self, x, dy, dx, dscale, dbias),
        )  # fmt: skip
        return dx, dscale, dbias

    def packed(self, saved: Saved) -> torch.Tensor:
        """Return the saved statistics in a tensor, after a number for the memory order."""
        values = self.work.saved_values(saved)
        return torch.from_numpy(np.concatenate([[_signature(self.work.layout)], values]))

    def unpacked(self, packed: torch.Tensor) -> Saved | None:
        """Return the statistics that were packed, or None if they have another memory order."""
        layout = self.work.layout
        size = 1 + 3 * layout.grouped.samples * layout.grouped.groups
        ours = packed.is_cpu and packed.dtype is torch.float64 and packed.shape == (size,)
        if not ours or not is_plain(packed, "saved"):
            return None
        packed = packed.contiguous()
        if packed[0].item() != _signature(layout):
            return None
        return Saved(packed.data_ptr() + packed.itemsize, packed)

    def _arrays(self, x: torch.Tensor) -> Arrays:
        mask = self.mask
        where, size = (0, 0) if mask is None else (address(mask), mask.size)
        return Arrays(x.data_ptr(), _where(self.scale), _where(self.bias), where, size)


class CpuEngine:
    """The CPU kernels, run by PyTorch's threads."""

    def why_unavailable(self, device: torch.device, float16: bool = False) -> Unsupported | None:
        """Return why CPU kernels are unavailable here; None if they are available."""
        return availability.why_unavailable(float16)

    def bind(
        self, adapter: Any, x: torch.Tensor, scale: Any, bias: Any, mask: Any, options: CallOptions
    ) -> Call | Unsupported:
        """Return the bound call; all tensors must be plain ones."""
        for parameter in (scale, bias):
            if isinstance(parameter, torch.Tensor) and not parameter.is_cpu:
                return Unsupported("a parameter is on a different device than x")
        work = planned(
            adapter, x.shape, x.stride(), x.dtype, None if scale is None else scale.dtype,
            None if bias is None else bias.dtype, options, _TEAM,
        )  # fmt: skip
        bound = bind(work, scale, bias, mask, _flat_mask, _flat_parameter)
        if isinstance(bound, Unsupported):
            return bound
        return Call(adapter, options, bound.work, bound.mask, bound.scale, bound.bias)

    def nothing_saved(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """Return a tensor of the size of `Call.packed` that stands for no saved statistics."""
        return torch.zeros(1 + 3 * groups, dtype=torch.float64)


def _flat_parameter(parameter: Any, neutral: float, work: Work) -> Any:
    """Return a parameter as contiguous float32, without a copy if it is already."""
    if parameter is None:
        return availability.constant(neutral, work.channels)
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


def _where(parameter: Any) -> int:
    if isinstance(parameter, torch.Tensor):
        return parameter.data_ptr()
    return address(parameter)


def _fresh(a: torch.Tensor) -> int:
    """Return the address of a new tensor; request huge pages for it if it is large."""
    where = a.data_ptr()
    if a.nbytes >= WORTH:
        want_large_pages(where, a.nbytes)
    return where
