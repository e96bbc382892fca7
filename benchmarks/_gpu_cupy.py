"""The contenders of gpu.py in CuPy: textbook group normalization, and ours.

The textbook version computes in float32, as 16-bit sums require. With NumPy in place of CuPy
everything but the timers runs on a CPU.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from _gpu_cases import ACTIVATION, EPSILON, GROUPS, OURS, SEED, TEXTBOOK, Case
from _gpu_measure import Call, Timer, both_timers, elements, graph_launches, named

BLOCK = 2**22  # elements; larger arrays repeat them


def missing() -> str | None:
    """Why there is no usable GPU, or None."""
    try:
        return None if cupy.cuda.runtime.getDeviceCount() else "CuPy finds no GPU"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no GPU ({error})"


def gpu_name() -> str:
    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


def release() -> None:
    """Release memory between rows."""
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()


def small_dtype(xp: Any) -> np.dtype:
    """bfloat16 if this CuPy supports it, else float16."""
    try:
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
        widened = xp.asarray(np.ones(2, dtype)).astype(np.float32)
        if float((widened + 1).astype(dtype).astype(np.float32)[0]) == 2:
            return dtype
    except Exception:
        return np.dtype(np.float16)
    return np.dtype(np.float16)


def wait() -> None:
    cupy.cuda.runtime.deviceSynchronize()


class Contest:
    """A row's buffers and contenders."""

    def __init__(
        self,
        case: Case,
        xp: Any = cupy,
        backend: str = "cupy",
        implementation: str | None = "fused",
    ):
        self.case, self.xp, self.backend = case, xp, backend
        self.small = small_dtype(xp)
        self.dtype = self.small.name
        rng = np.random.default_rng(SEED)
        block = min(BLOCK, math.prod(case.dims))
        self.block = xp.asarray(rng.standard_normal(block, np.float32).astype(self.small))
        self.scale, self.bias = (
            xp.asarray(rng.standard_normal(case.channels, np.float32).astype(self.small))
            for _ in range(2)
        )
        self.x = [self._buffer() for _ in range(case.buffers)]
        self.dy = [self._buffer() for _ in range(case.buffers if case.both else 0)]
        self.makers: dict[str, Callable[[], Call]] = {
            OURS: lambda: self._ours(implementation),
            TEXTBOOK: self._textbook,
        }

    def _buffer(self) -> Any:
        dims = self.case.array_dims
        many = -(-math.prod(dims) // self.block.size)
        return self.xp.tile(self.block, many)[: math.prod(dims)].reshape(dims).copy()

    def _ours(self, implementation: str | None) -> Call:
        from groupnorm import GroupNorm

        first, channels = self.case.first, self.case.channels
        layer = GroupNorm(
            (channels, ...) if first else channels, feature_axis=0 if first else -1,
            num_groups=GROUPS, epsilon=EPSILON, activation=ACTIVATION, dtype="input",
            param_dtype=self.dtype, backend=self.backend, implementation=implementation,
        )  # fmt: skip
        layer.scale, layer.bias = self.scale, self.bias

        def both(i: int) -> tuple[Any, ...]:
            y, pullback = layer.vjp(self.x[i])
            return (y, *pullback(self.dy[i]))

        return both if self.case.both else lambda i: layer(self.x[i])

    def fallback(self) -> Call:
        return self._ours("portable")

    def _textbook(self) -> Call:
        if self.case.both:
            return lambda i: textbook_vjp(self.xp, self.case, self.x[i], self.scale, self.bias,
                                          self.dy[i])  # fmt: skip
        return lambda i: textbook(self.xp, self.case, self.x[i], self.scale, self.bias)

    def timers(self, name: str, call: Call) -> dict[str, Timer]:
        return both_timers(name, call, self.case.buffers, graphed, evented)

    def differences(self, found: Any, expected: Any) -> dict[str, float]:
        pairs = named(found, expected, self.case)
        return {name: difference(self.xp, a, b) for name, a, b in pairs}

    def wait(self) -> None:
        if self.xp is cupy:
            wait()


def difference(xp: Any, a: Any, b: Any) -> float:
    """Largest difference; for sums over the samples, relative to their largest."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    size = xp.maximum(abs(b), 1)
    return float((abs(a - b) / (size.max() if b.ndim == 1 else size)).max())


# ---- the textbook -------------------------------------------------------------------------------


def grouped_axes(case: Case) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shape with a group axis, the reduced axes in it, and the shape of a parameter."""
    samples, channels, *space = case.dims
    apart = (GROUPS, channels // GROUPS)
    if case.first:
        shape = (samples, *apart, *space)
        return shape, tuple(range(2, len(shape))), (channels, *(1 for _ in space))
    shape = (samples, *space, *apart)
    return shape, (*range(1, len(shape) - 2), len(shape) - 1), (channels,)


def normalized_parts(case: Case, x: Any) -> tuple[Any, Any]:
    """Normalized values and 1 / standard deviation, with a group axis."""
    shape, axes, _ = grouped_axes(case)
    grouped = x.astype(np.float32).reshape(shape)
    mean = grouped.mean(axes, keepdims=True)
    rstd = 1 / (grouped.var(axes, keepdims=True) + np.float32(EPSILON)) ** np.float32(0.5)
    return (grouped - mean) * rstd, rstd


def textbook(xp: Any, case: Case, x: Any, scale: Any, bias: Any) -> Any:
    """Textbook group normalization and SiLU."""
    each = grouped_axes(case)[2]
    scale, bias = (p.astype(np.float32).reshape(each) for p in (scale, bias))
    y = normalized_parts(case, x)[0].reshape(x.shape) * scale + bias
    return (y / (1 + xp.exp(-y))).astype(x.dtype)


def textbook_vjp(xp: Any, case: Case, x: Any, scale: Any, bias: Any, dy: Any) -> tuple[Any, ...]:
    """The same and its gradients, from the formula."""
    shape, axes, each = grouped_axes(case)
    others = tuple(a for a in range(x.ndim) if a != (1 if case.first else x.ndim - 1))
    wide_scale, wide_bias = (p.astype(np.float32).reshape(each) for p in (scale, bias))
    normalized, rstd = normalized_parts(case, x)
    flat = normalized.reshape(x.shape)
    z = flat * wide_scale + wide_bias
    sigmoid = 1 / (1 + xp.exp(-z))
    dz = dy.astype(np.float32) * sigmoid * (1 + z * (1 - sigmoid))
    dscale, dbias = (dz * flat).sum(others), dz.sum(others)
    d = (dz * wide_scale).reshape(shape)
    dx = rstd * (
        d - d.mean(axes, keepdims=True) - normalized * (d * normalized).mean(axes, keepdims=True)
    )
    found = (z * sigmoid, dx.reshape(x.shape), dscale, dbias)
    return tuple(a.astype(x.dtype) for a in found)


# ---- timers -------------------------------------------------------------------------------------


def graphed(call: Call, count: int) -> Timer:
    """Launches of a graph of one call for each buffer; every call has a separate result.

    Allocations during capture come from a separate pool, filled by earlier calls: a capture cannot
    allocate, and memory returned to a common pool could be reused by others.
    """
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.runtime.deviceSynchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        kept = [call(i) for i in range(count)]
        stream.synchronize()
        kept.clear()
        stream.begin_capture()
        try:
            kept = [call(i) for i in range(count)]
        finally:
            graph = stream.end_capture()
    handle = getattr(graph, "graph", None)
    nodes = graph_launches(handle) if handle else None
    held = (pool, kept)

    def run(repeats: int) -> float:
        assert held
        return timed(lambda: [graph.launch(stream) for _ in range(repeats)], stream)

    return Timer("CUDA graph", run, count, None if nodes is None else nodes / count)


def evented(call: Call, count: int) -> Timer:
    """Calls one after the other, including the host's time if that is longer."""

    def calls(repeats: int) -> None:
        kept = [None] * count
        for _ in range(repeats):
            for i in range(count):
                kept[i] = call(i)

    stream = cupy.cuda.Stream.null
    return Timer("CUDA events", lambda repeats: timed(lambda: calls(repeats), stream), count)


def timed(work: Callable[[], Any], stream: Any) -> float:
    """Microseconds on the device between start and end of some work."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.runtime.deviceSynchronize()
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return 1e3 * cupy.cuda.get_elapsed_time(start, end)


def copy_timer(size: int, count: int) -> Timer:
    sources = [cupy.zeros(elements(size), np.uint16) for _ in range(count)]
    targets = [cupy.empty_like(source) for source in sources]

    def call(i: int) -> None:
        targets[i].data.copy_from_device_async(
            sources[i].data, size, cupy.cuda.get_current_stream()
        )

    try:
        return graphed(call, count)
    except Exception:
        return evented(call, count)


# ---- checks -------------------------------------------------------------------------------------


def vjp(arrays: dict[str, Any], dtype: str, first: bool, options: dict[str, Any],
        xp: Any = cupy) -> list[np.ndarray]:  # fmt: skip
    """Y and the gradients of x, scale and bias as NumPy's float32, by `group_norm_vjp`.

    NumPy arrays: x, dy (N, C, *spatial), scale, bias, and mask (N, 1, *spatial) or None.
    """
    from groupnorm import group_norm_vjp

    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16

    def put(name: str) -> Any:
        a = arrays[name]
        if a is None:
            return None
        if a.ndim > 1 and not first:
            a = np.moveaxis(a, 1, -1)
        return xp.asarray(np.ascontiguousarray(a if name == "mask" else a.astype(dtype)))

    x, dy, scale, bias, mask = map(put, ("x", "dy", "scale", "bias", "mask"))
    y, pullback = group_norm_vjp(
        x, scale, bias, mask=mask, feature_axis=1 if first else -1, **options
    )
    found = [np.asarray(a.get() if xp is cupy else a) for a in (y, *pullback(dy))]
    found = [a.astype(np.float32) for a in found]
    return found if first else [np.moveaxis(a, -1, 1) if a.ndim > 1 else a for a in found]
