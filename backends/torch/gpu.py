"""Calling the GPU kernels with tensors; Triton launches them on the current stream."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.binding import bind
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.gpu.build import COMPILED, kernel_of
from groupnorm.backends.kernels.gpu.launch import Work, planned
from groupnorm.backends.kernels.gpu.probe import DeviceProbe, why_too_old
from groupnorm.backends.kernels.layout import flat_mask, unflat_mask
from groupnorm.backends.torch.internals import has_modes
from groupnorm.backends.torch.memory import cotangent, in_memory, is_plain, is_plain_mask, like
from groupnorm.plan import product
from groupnorm.portable.inputs import HOST_MASKS, host_mask

__all__ = ["Call", "GpuEngine", "run"]


class Call(NamedTuple):
    """A call bound to kernels."""

    adapter: Any
    options: CallOptions
    work: Work
    mask: torch.Tensor | None  # as `layout.flat_mask` returns it
    scale: torch.Tensor | None  # contiguous, of any dtype that kernels read
    bias: torch.Tensor | None
    rows: bool  # whether scale and bias have a row for each sample

    def with_parameters(self, x: torch.Tensor, scale: Any, bias: Any) -> "Call | Unsupported":
        """Return the call with other parameters; all tensors must be plain ones."""
        bound = bind(
            self.work, scale, bias, None, lambda given, work: None,
            lambda given: _parameter(self.adapter, given, x),
        )  # fmt: skip
        if isinstance(bound, Unsupported):
            return bound
        return self._replace(scale=bound.scale, bias=bound.bias, rows=bound.rows)

    def broadcastable_mask(self) -> Any:
        """Return the mask as it was at the call, broadcastable to x; None without a mask."""
        if self.mask is None:
            return None
        return unflat_mask(self.mask.view(torch.bool), self.work.layout)

    def forward(self, x: torch.Tensor, *, keep: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y, which has x's memory layout, and the statistics for backward."""
        layout, shape = self.work.layout, self.work.shape
        given, y = in_memory(x, layout), like(x, layout, self.work.dtypes.result_dtype)
        statistics = x.new_empty(gpu.statistics_shape(shape), dtype=torch.float32)
        run(self.work.forward(*self._there), self._arrays(given, y=y, statistics=statistics))
        return y, statistics

    def backward(
        self, statistics: torch.Tensor, x: torch.Tensor, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dx, and the gradients of scale and bias, flat in float32."""
        layout = self.work.layout
        dy, dx = cotangent(dy, x, layout), like(x, layout, x.dtype)
        size = self.work.gradient_rows(rows=self.rows) * self.work.shape.channels
        dscale = x.new_empty(size, dtype=torch.float32)
        dbias = torch.empty_like(dscale)
        arrays = self._arrays(
            in_memory(x, layout), dy=dy, dx=dx, statistics=statistics, dscale=dscale, dbias=dbias
        )
        run(self.work.backward(*self._there), arrays)
        return dx, dscale, dbias

    def packed(self, statistics: torch.Tensor) -> torch.Tensor:
        """Return the statistics as the operator saves them."""
        return statistics.view(-1)

    def unpacked(self, packed: torch.Tensor) -> torch.Tensor | None:
        """Return the statistics that were packed, or None if something else came back.

        They do not depend on the memory order.
        """
        ours = packed.dtype is torch.float32 and packed.is_cuda
        if not ours or not is_plain(packed, "saved"):
            return None
        size = product(gpu.statistics_shape(self.work.shape))
        return packed.contiguous() if packed.shape == (size,) else None

    @property
    def _there(self) -> tuple[int, bool, bool, bool]:
        mask = 0 if self.mask is None else self.mask.numel()
        return mask, self.scale is not None, self.bias is not None, self.rows

    def _arrays(self, x: torch.Tensor, **others: torch.Tensor) -> dict[str, Any]:
        return {
            "x": x, "scale": self.scale, "bias": self.bias, "mask": self.mask, **others
        }  # fmt: skip


class GpuEngine:
    """The GPU kernels, called with tensors."""

    def why_unavailable(self, device: torch.device) -> Unsupported | None:
        """Return why kernels cannot run on a device; None if they can. The first call probes it."""
        if device.type != "cuda":
            return Unsupported(f"there are no kernels for PyTorch tensors on {device.type}")
        return _probe.why_unavailable(device.index or 0)

    def bind(
        self, adapter: Any, x: torch.Tensor, scale: Any, bias: Any, mask: Any, options: CallOptions
    ) -> Call | Unsupported:
        """Return the bound call; all tensors must be plain ones."""
        why = self.why_unavailable(x.device)
        if why is not None:
            return why
        for name, a in (("scale", scale), ("bias", bias)):
            if isinstance(a, torch.Tensor) and a.device != x.device:
                return Unsupported(f"{name} is on {a.device} and x on {x.device}")
        dtypes = (None if p is None else p.dtype for p in (scale, bias))
        work = planned(adapter, x.shape, x.stride(), x.dtype, *dtypes, options)
        bound = bind(
            work, scale, bias, mask,
            lambda given, work: _flat_mask(adapter, given, x, work),
            lambda given: _parameter(adapter, given, x),
        )  # fmt: skip
        if isinstance(bound, Unsupported):
            return bound
        return Call(adapter, options, bound.work, bound.mask, bound.scale, bound.bias, bound.rows)

    def nothing_saved(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """Return a tensor of the size of `Call.packed` that stands for no saved statistics.

        Checking it would wait for the device, so it holds NaN: wrong use shows in the gradients.
        """
        return torch.full((4 * groups,), torch.nan, dtype=torch.float32, device=x.device)


def _parameter(adapter: Any, parameter: Any, x: torch.Tensor) -> torch.Tensor | None:
    if parameter is None:
        return None
    if isinstance(parameter, np.ndarray):
        parameter = adapter.from_host(parameter, x)
    if parameter.dtype.itemsize == 1:  # a float8, which kernels do not read
        parameter = parameter.to(torch.float32)
    found: torch.Tensor = parameter.detach().contiguous()
    return found


def _flat_mask(adapter: Any, mask: Any, x: torch.Tensor, work: Work) -> Any:
    if isinstance(mask, torch.Tensor):
        if not is_plain_mask(mask):
            return Unsupported("the mask is not a plain tensor of real numbers")
        if mask.device != x.device:
            return Unsupported("the mask is on a different device than x")
    elif not isinstance(mask, HOST_MASKS):
        return Unsupported("the mask is an array of another library")
    else:
        mask = adapter.from_host(host_mask(mask), x)
    mask = mask.detach()
    boolean = mask if mask.dtype is torch.bool else mask != 0
    return flat_mask(boolean, work.layout, adapter.xp)


# Launching ----------------------------------------------------------------------------------------


def run(program: gpu.LaunchSequence, arrays: dict[str, Any]) -> None:
    """Launch the steps of a program; `arrays` maps its names to tensors, or None."""
    x = next(iter(arrays.values()))
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            run(program, arrays)
        return
    for name, elements in program.shared:
        arrays[name] = x.new_empty(elements, dtype=torch.float32)
    for step in program.launches:
        # An unused pointer must still be valid.
        pointers = [x if (a := arrays.get(name)) is None else a for name in step.arrays]
        kernel, keywords = _launch(step)
        kernel[step.grid](*pointers, **keywords)


@lru_cache(maxsize=4096)
def _launch(step: gpu.Launch) -> tuple[Any, dict[str, Any]]:
    kernel = kernel_of(step.module, step.kernel)
    return kernel, {
        **dict(step.scalars),
        **dict(step.constants),
        "num_warps": step.warps,
        **COMPILED,
    }


def _busy() -> bool:
    return torch.cuda.is_current_stream_capturing() or has_modes()


def _why_unsupported(index: int) -> Unsupported | None:
    if torch.version.hip or not torch.cuda.is_available():
        return Unsupported(
            "there are no kernels for PyTorch tensors on cuda here: there is no NVIDIA GPU"
        )
    major, minor = torch.cuda.get_device_capability(index)
    return why_too_old(10 * major + minor)


def _compute(index: int, array: Any, program: gpu.LaunchSequence) -> Any:
    x = torch.from_numpy(array).to(f"cuda:{index}")
    y, statistics = torch.empty_like(x), torch.empty_like(x)  # statistics are smaller
    run(program, {"x": x, "y": y, "statistics": statistics})
    return y.cpu().numpy()


_probe = DeviceProbe("PyTorch", _why_unsupported, _busy, _compute)
