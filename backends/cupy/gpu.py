"""Calling the GPU kernels with CuPy arrays, on the current stream of their device."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import cupy
import numpy as np

from groupnorm.adapter import Kernels, Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.binding import bind
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.gpu.driver import Launches, PreparedWork
from groupnorm.backends.kernels.gpu.launch import Work, planned
from groupnorm.backends.kernels.gpu.probe import DeviceProbe, why_too_old
from groupnorm.backends.kernels.layout import flat_mask, in_memory, restored
from groupnorm.portable.inputs import HOST_MASKS, check_cotangent, host_mask
from groupnorm.typing import Gradients

__all__ = ["CupyKernels", "why_unavailable"]


class _Call(NamedTuple):
    """A call bound to kernels."""

    prepared: PreparedWork
    x: Any  # in memory order
    scale: Any
    bias: Any
    mask: Any
    rows: bool  # whether scale and bias have a row for each sample

    @property
    def work(self) -> Work:
        """What was planned."""
        return self.prepared.work

    def forward(self) -> tuple[Any, Any]:
        """Return y, which has x's memory layout, and the statistics."""
        layout = self.work.layout
        y = cupy.empty(layout.plan.shape, self.work.dtypes.result_dtype)
        statistics = cupy.empty(gpu.statistics_shape(self.work.shape), np.float32)
        self._launcher("forward", None)(self.x, self.scale, self.bias, self.mask, y, statistics)
        return restored(y, layout), statistics

    def backward(self, statistics: Any, dy: Any) -> tuple[Any, Any, Any]:
        """Return dx, and the gradients of scale and bias, flat in the dtypes of these."""
        layout = self.work.layout
        dy, dx = in_memory(dy, layout, cupy), cupy.empty(layout.plan.shape, self.x.dtype)
        # Written by the last kernel, so that nothing else has to convert them.
        size = self.work.gradient_rows(rows=self.rows) * self.work.shape.channels
        dscale, dbias = (
            cupy.empty(size, np.float32 if a is None else a.dtype) for a in (self.scale, self.bias)
        )
        self._launcher("backward", dy.dtype)(
            self.x, self.scale, self.bias, self.mask, dy, statistics, dx, dscale, dbias
        )
        return restored(dx, layout), dscale, dbias

    def _launcher(self, task: str, dy: Any) -> Any:
        return self.prepared.launcher(
            task, 0 if self.mask is None else self.mask.size,
            None if self.scale is None else self.scale.dtype,
            None if self.bias is None else self.bias.dtype, dy, self.rows,
        )  # fmt: skip


class CupyKernels(Kernels):
    """The GPU kernels, called with CuPy arrays."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self._adapter = adapter

    def why_unavailable(self, device: str) -> Unsupported | None:
        """Return why kernels are unavailable: Triton is missing, or the probe failed."""
        return why_unavailable(int(device.partition(":")[2] or 0))

    def forward(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y, or `Unsupported`."""
        call = _call(self._adapter, x, scale, bias, mask, options)
        if isinstance(call, Unsupported):
            return call
        with x.device:
            return call.forward()[0]

    def vjp(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y and its pullback, or `Unsupported`."""
        call = _call(self._adapter, x, scale, bias, mask, options)
        if isinstance(call, Unsupported):
            return call
        with x.device:
            # The caller may modify parameters in place before calling the pullback.
            call = call._replace(
                scale=None if call.scale is None else call.scale.copy(),
                bias=None if call.bias is None else call.bias.copy(),
            )
            y, statistics = call.forward()
        return y, _pullback(self._adapter, call, statistics, x, scale, bias)


def _pullback(
    adapter: Any, call: _Call, statistics: Any, x: Any, scale: Any, bias: Any
) -> Callable[[Any], Gradients]:
    def pullback(dy: Any) -> Gradients:
        dy = check_cotangent(adapter, dy, x)
        with x.device:
            if dy.dtype != x.dtype and dy.dtype != np.float32:
                dy = dy.astype(np.float32)
            dx, *gradients = call.backward(statistics, dy)
            return Gradients(
                dx,
                *(
                    None if p is None else g.astype(p.dtype, copy=False).reshape(p.shape)
                    for g, p in zip(gradients, (scale, bias), strict=True)
                ),
            )

    return pullback


def _call(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
    if type(x) is not cupy.ndarray:
        return Unsupported(f"x is of type {type(x).__name__}")
    for name, a in (("scale", scale), ("bias", bias)):
        if a is not None and type(a) not in (cupy.ndarray, np.ndarray):
            return Unsupported(f"{name} is of type {type(a).__name__}")
    others: dict[str, Any] = {"scale": scale, "bias": bias, "mask": mask}
    for name, a in others.items():
        if isinstance(a, cupy.ndarray) and a.device != x.device:
            return Unsupported(f"{name} is on {a.device} and x on {x.device}")
    why = why_unavailable(x.device.id)
    if why is not None:
        return why
    strides = tuple(s // x.itemsize for s in x.strides)
    dtypes = (None if p is None else p.dtype for p in (scale, bias))
    prepared = _prepared(x.device.id, adapter, x.shape, strides, x.dtype, *dtypes, options)
    if isinstance(prepared, Unsupported):
        return prepared
    with x.device:
        bound = bind(
            prepared.work, scale, bias, mask,
            lambda given, work: _flat_mask(adapter, given, work),
            lambda given: _parameter(given),
        )  # fmt: skip
        if isinstance(bound, Unsupported):
            return bound
        stored = in_memory(x, prepared.work.layout, cupy)
    return _Call(prepared, stored, bound.scale, bound.bias, bound.mask, bound.rows)


@lru_cache(maxsize=4096)
def _prepared(
    device: int, adapter: Any, shape: Any, strides: Any, x: Any, scale: Any, bias: Any,
    options: CallOptions,
) -> PreparedWork | Unsupported:  # fmt: skip
    """Plan a call as `planned` does, for a device."""
    work = planned(adapter, shape, strides, x, scale, bias, options)
    if isinstance(work, Unsupported):
        return work
    return PreparedWork(work, lambda sequence, dtypes: prepare(sequence, dtypes, device))


def _parameter(parameter: Any) -> Any:
    return None if parameter is None else cupy.ascontiguousarray(cupy.asarray(parameter))


def _flat_mask(adapter: Any, mask: Any, work: Work) -> Any:
    if not isinstance(mask, (cupy.ndarray, *HOST_MASKS)):
        return Unsupported("the mask is of another library")
    given = mask if isinstance(mask, cupy.ndarray) else cupy.asarray(host_mask(mask))
    if given.dtype.kind == "c":
        return Unsupported("the mask is complex")
    return flat_mask(given != 0, work.layout, adapter.xp)


# Launching ----------------------------------------------------------------------------------------


def prepare(
    sequence: gpu.LaunchSequence, dtypes: dict[str, str], device: int
) -> Callable[..., None]:
    """Prepare launches for arrays on a device, of these dtypes by name.

    Return a function of the arrays in the order of `dtypes`, which launches them on the current
    stream of the device, which must be the current one; None stands for a missing array.
    """
    launches = Launches(sequence, dtypes, device)
    elements = launches.temporaries

    def launch(x: Any, *others: Any) -> None:
        at = x.data.ptr
        addresses = [at, *[at if a is None else a.data.ptr for a in others]]
        if elements:
            # Freed on return, and given to later work on the same stream only.
            temporary = cupy.empty(elements, np.float32)
            addresses.append(temporary.data.ptr)
        launches(cupy.cuda.get_current_stream().ptr, addresses)

    return launch


def captures() -> bool:
    """Whether launches are recorded in a CUDA graph."""
    return bool(cupy.cuda.get_current_stream().is_capturing())


def _compute(device: int, array: Any, program: gpu.LaunchSequence) -> Any:
    with cupy.cuda.Device(device):
        x = cupy.asarray(array)
        y, statistics = cupy.empty_like(x), cupy.empty_like(x)  # statistics are smaller
        dtypes: dict[str, str] = dict.fromkeys(("x", "y", "statistics"), "float32")
        prepare(program, dtypes, device)(x, y, statistics)
        return cupy.asnumpy(y)


def _why_unsupported(device: int) -> Unsupported | None:
    return why_too_old(int(cupy.cuda.Device(device).compute_capability))


_probe = DeviceProbe("CuPy", _why_unsupported, captures, _compute)


def why_unavailable(device: int) -> Unsupported | None:
    """Return why kernels cannot run on a device; None if they can. The first call probes it."""
    return _probe.why_unavailable(device)
