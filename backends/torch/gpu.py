"""Calling the GPU kernels with tensors, on the current stream of their device."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.binding import bind
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.gpu.driver import Launches, PreparedWork, dtype_name
from groupnorm.backends.kernels.gpu.launch import Work, planned
from groupnorm.backends.kernels.gpu.probe import DeviceProbe, why_too_old
from groupnorm.backends.kernels.layout import flat_mask, unflat_mask
from groupnorm.backends.torch.internals import current_stream, has_modes
from groupnorm.backends.torch.memory import cotangent, in_memory, is_plain, is_plain_mask, like
from groupnorm.portable.inputs import HOST_MASKS, host_mask

__all__ = ["Call", "GpuEngine", "run"]

# The dtypes in which kernels read parameters.
_READ = frozenset({torch.float32, torch.float16, torch.bfloat16})


class Call(NamedTuple):
    """A call bound to kernels."""

    adapter: Any
    options: CallOptions
    prepared: PreparedWork
    mask: torch.Tensor | None  # as `layout.flat_mask` returns it
    scale: torch.Tensor | None  # contiguous, of any dtype that kernels read
    bias: torch.Tensor | None
    rows: bool  # whether scale and bias have a row for each sample

    @property
    def work(self) -> Work:
        """What was planned."""
        return self.prepared.work

    def with_parameters(self, x: torch.Tensor, scale: Any, bias: Any) -> "Call | Unsupported":
        """Return the call with other parameters; all tensors must be plain ones."""
        shapes = self.prepared.parameter_shapes
        if (
            scale is self.scale
            and bias is self.bias
            and _can_be_read(scale, shapes)  # still, with what was assigned to its `data`
            and _can_be_read(bias, shapes)
        ):
            return self
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
        work = self.prepared.work
        given, y = in_memory(x, work.layout), like(x, work.layout, work.dtypes.result_dtype)
        # Flat: a shape would take as long as the launch.
        statistics = x.new_empty(self.prepared.statistics_size, dtype=torch.float32)
        self._launcher("forward", None)(given, self.scale, self.bias, self.mask, y, statistics)
        return y, statistics

    def backward(
        self, statistics: torch.Tensor, x: torch.Tensor, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dx, and the gradients of scale and bias, flat in the dtypes of these."""
        work, scale, bias = self.prepared.work, self.scale, self.bias
        layout, size = work.layout, work.gradient_rows(rows=self.rows) * work.shape.channels
        dy, dx = cotangent(dy, x, layout), like(x, layout, x.dtype)
        # Written by the last kernel, so that nothing else has to convert them.
        like_scale = torch.float32 if scale is None else scale.dtype
        like_bias = torch.float32 if bias is None else bias.dtype
        dscale = x.new_empty(size, dtype=like_scale)
        dbias = x.new_empty(size, dtype=like_bias)
        self._launcher("backward", dy.dtype)(
            in_memory(x, layout), scale, bias, self.mask, dy, statistics, dx, dscale, dbias
        )
        return dx, dscale, dbias

    def packed(self, statistics: torch.Tensor) -> torch.Tensor:
        """Return the statistics as the operator saves them."""
        return statistics

    def unpacked(self, packed: torch.Tensor) -> torch.Tensor | None:
        """Return the statistics that were packed, or None if something else came back.

        They do not depend on the memory order.
        """
        ours = packed.dtype is torch.float32 and packed.is_cuda
        if not ours or not is_plain(packed, "saved"):
            return None
        return packed.contiguous() if packed.shape == (self.prepared.statistics_size,) else None

    def _launcher(self, task: str, dy: torch.dtype | None) -> Any:
        _, _, prepared, mask, scale, bias, rows = self
        return prepared.launcher(
            task, 0 if mask is None else mask.numel(), None if scale is None else scale.dtype,
            None if bias is None else bias.dtype, dy, rows,
        )  # fmt: skip


class GpuEngine:
    """The GPU kernels, called with tensors."""

    def why_unavailable(self, device: torch.device) -> Unsupported | None:
        """Return why kernels cannot run on a device; None if they can. The first call probes it."""
        if device.type != "cuda":
            return Unsupported(f"there are no kernels for PyTorch tensors on {device.type}")
        return _probe.why_unavailable(device.index or 0)

    def prepare(
        self, sequence: gpu.LaunchSequence, dtypes: dict[str, str], device: int
    ) -> Callable[..., None]:
        """Prepare launches for tensors on a device, of these dtypes by name.

        Return a function of the tensors in the order of `dtypes`, which launches them; None stands
        for a missing one.
        """
        launches = Launches(sequence, dtypes, device)
        elements = launches.temporaries

        def launch(x: torch.Tensor, *others: torch.Tensor | None) -> None:
            at = x.data_ptr()
            addresses = [at, *[at if a is None else a.data_ptr() for a in others]]
            if elements:
                # Freed on return, and given to later work on the same stream only.
                temporary = x.new_empty(elements, dtype=torch.float32)
                addresses.append(temporary.data_ptr())
            launches(current_stream(device), addresses)

        return launch

    def bind(
        self, adapter: Any, x: torch.Tensor, scale: Any, bias: Any, mask: Any, options: CallOptions
    ) -> Call | Unsupported:
        """Return the bound call; all tensors must be plain ones."""
        why = self.why_unavailable(x.device)
        if why is not None:
            return why
        device = x.get_device()
        for name, a in (("scale", scale), ("bias", bias)):
            if isinstance(a, torch.Tensor) and a.get_device() != device:
                return Unsupported(f"{name} is on {a.device} and x on {x.device}")
        prepared = _prepared(
            self, device, adapter, x.shape, x.stride(), x.dtype,
            None if scale is None else scale.dtype, None if bias is None else bias.dtype, options,
        )  # fmt: skip
        if isinstance(prepared, Unsupported):
            return prepared
        shapes = prepared.parameter_shapes
        if mask is None and _can_be_read(scale, shapes) and _can_be_read(bias, shapes):  # mostly
            return Call(adapter, options, prepared, None, scale, bias, False)
        bound = bind(
            prepared.work, scale, bias, mask,
            lambda given, work: _flat_mask(adapter, given, x, work),
            lambda given: _parameter(adapter, given, x),
        )  # fmt: skip
        if isinstance(bound, Unsupported):
            return bound
        return Call(adapter, options, prepared, bound.mask, bound.scale, bound.bias, bound.rows)

    def nothing_saved(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """Return a tensor of the size of `Call.packed` that stands for no saved statistics.

        Checking it would wait for the device, so it holds NaN: wrong use shows in the gradients.
        """
        return torch.full((4 * groups,), torch.nan, dtype=torch.float32, device=x.device)


@lru_cache(maxsize=4096)
def _prepared(
    engine: GpuEngine, device: int, adapter: Any, shape: Any, strides: Any, x: Any, scale: Any,
    bias: Any, options: CallOptions,
) -> PreparedWork | Unsupported:  # fmt: skip
    """Plan a call as `planned` does, for a device."""
    work = planned(adapter, shape, strides, x, scale, bias, options)
    if isinstance(work, Unsupported):
        return work
    return PreparedWork(work, lambda sequence, dtypes: engine.prepare(sequence, dtypes, device))


def _can_be_read(parameter: Any, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether kernels read a parameter as it is; None if it is missing."""
    return parameter is None or (
        parameter.dtype in _READ and parameter.shape in shapes and parameter.is_contiguous()
    )


def _parameter(adapter: Any, parameter: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Return a parameter as kernels read it, without a copy if it can be read as it is."""
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


# Whether it works on a device ---------------------------------------------------------------------


def run(
    sequence: gpu.LaunchSequence,
    arrays: dict[str, torch.Tensor | None],
    engine: GpuEngine | None = None,
) -> None:
    """Launch a sequence once, for which nothing is prepared; x is the first of the arrays."""
    x: Any = next(iter(arrays.values()))
    dtypes = {n: dtype_name((x if a is None else a).dtype) for n, a in arrays.items()}
    (engine or GpuEngine()).prepare(sequence, dtypes, x.get_device())(*arrays.values())


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
