"""Calling the GPU kernels with CuPy arrays: Triton's cubins, launched on the current stream."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import cupy
import numpy as np

from groupnorm.adapter import Kernels, Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.binding import bind
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.gpu.build import ALIGNMENT, build
from groupnorm.backends.kernels.gpu.launch import Work, planned
from groupnorm.backends.kernels.gpu.probe import DeviceProbe, why_too_old
from groupnorm.backends.kernels.layout import flat_mask, in_memory, restored
from groupnorm.portable.inputs import HOST_MASKS, check_cotangent, host_mask
from groupnorm.typing import Gradients

__all__ = ["CupyKernels", "why_unavailable"]


class _Call(NamedTuple):
    """A call bound to kernels."""

    work: Work
    arrays: dict[str, Any]  # x, in memory order, scale, bias and mask, or None
    rows: bool  # whether scale and bias have a row for each sample

    def forward(self) -> tuple[Any, Any]:
        """Return y, which has x's memory layout, and the statistics."""
        layout = self.work.layout
        y = cupy.empty(layout.plan.shape, self.work.dtypes.result_dtype)
        statistics = cupy.empty(gpu.statistics_shape(self.work.shape), np.float32)
        program = self.work.forward(*self._there)
        run(program, {**self.arrays, "y": y, "statistics": statistics})
        return restored(y, layout), statistics

    def backward(self, statistics: Any, dy: Any) -> tuple[Any, Any, Any]:
        """Return dx, and the gradients of scale and bias, flat in float32."""
        layout, x = self.work.layout, self.arrays["x"]
        dx = cupy.empty(layout.plan.shape, x.dtype)
        size = self.work.gradient_rows(rows=self.rows) * self.work.shape.channels
        dscale, dbias = (cupy.empty(size, np.float32) for _ in range(2))
        results = {"dx": dx, "dscale": dscale, "dbias": dbias}
        given = {"dy": in_memory(dy, layout, cupy), "statistics": statistics}
        run(self.work.backward(*self._there), {**self.arrays, **given, **results})
        return restored(dx, layout), dscale, dbias

    @property
    def _there(self) -> tuple[int, bool, bool, bool]:
        mask = self.arrays["mask"]
        scale, bias = (self.arrays[name] is not None for name in ("scale", "bias"))
        return 0 if mask is None else mask.size, scale, bias, self.rows


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
            copies = {
                n: None if (p := call.arrays[n]) is None else p.copy() for n in ("scale", "bias")
            }
            call = call._replace(arrays={**call.arrays, **copies})
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
    work = planned(adapter, x.shape, strides, x.dtype, *dtypes, options)
    with x.device:
        bound = bind(
            work, scale, bias, mask,
            lambda given, work: _flat_mask(adapter, given, work),
            lambda given: _parameter(given),
        )  # fmt: skip
        if isinstance(bound, Unsupported):
            return bound
        arrays = {
            "x": in_memory(x, bound.work.layout, cupy), "scale": bound.scale, "bias": bound.bias,
            "mask": bound.mask,
        }  # fmt: skip
    return _Call(bound.work, arrays, bound.rows)


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


def run(program: gpu.LaunchSequence, arrays: dict[str, Any]) -> None:
    """Launch the steps of a program on the current device and stream."""
    x = arrays["x"]
    for name, elements in program.shared:
        arrays[name] = cupy.empty(elements, np.float32)
    for step in program.launches:
        # An unused pointer must still be valid.
        pointers = [x if (a := arrays.get(name)) is None else a for name in step.arrays]
        launch(step, pointers)


def launch(step: gpu.Launch, pointers: list[Any]) -> None:
    """Launch one step."""
    dtypes = tuple(a.dtype.name for a in pointers)
    aligned = tuple(a.data.ptr % ALIGNMENT == 0 for a in pointers)
    device = cupy.cuda.Device().id
    built, arguments = build(step, dtypes, aligned, _capability(device), False)
    scalars = [np.int32(v) if kind == "i32" else np.int64(v) for kind, v in arguments]
    null_pointers = [np.uint64(0)] * built.scratch
    _loaded(built.cubin_path, built.name, device)(
        (*step.grid, 1, 1)[:3], (built.threads, 1, 1), (*pointers, *scalars, *null_pointers),
        shared_mem=built.shared,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _loaded(path: str, name: str, device: int) -> Any:
    return cupy.RawModule(path=path).get_function(name)


@lru_cache(maxsize=64)
def _capability(device: int) -> int:
    return int(cupy.cuda.Device(device).compute_capability)


def captures() -> bool:
    """Whether launches are recorded in a CUDA graph."""
    return bool(cupy.cuda.get_current_stream().is_capturing())


def _compute(device: int, array: Any, program: gpu.LaunchSequence) -> Any:
    with cupy.cuda.Device(device):
        x = cupy.asarray(array)
        y, statistics = cupy.empty_like(x), cupy.empty_like(x)  # statistics are smaller
        run(program, {"x": x, "y": y, "statistics": statistics})
        return cupy.asnumpy(y)


_probe = DeviceProbe("CuPy", lambda device: why_too_old(_capability(device)), captures, _compute)


def why_unavailable(device: int) -> Unsupported | None:
    """Return why kernels cannot run on a device; None if they can. The first call probes it."""
    return _probe.why_unavailable(device)
