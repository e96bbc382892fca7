"""The contenders of gpu.py in CuPy: textbook group normalization, and ours.

The textbook version computes in float32, as 16-bit sums require.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from _gpu_cases import ACTIVATION, DRY, EPSILON, GROUPS, OURS, SEED, TEXTBOOK, Case
from _gpu_measure import Call, Timer, both_timers

if DRY:
    import _gpu_dry

    cupy: Any = _gpu_dry.Cupy()
    BACKEND, IMPLEMENTATION = "numpy", None
else:
    import cupy

    BACKEND, IMPLEMENTATION = "cupy", "fused"

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


def dtype_of(name: str) -> Any:
    """NumPy's dtype; bfloat16 is that of ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def wait() -> None:
    cupy.cuda.runtime.deviceSynchronize()


class Contest:
    """A row's buffers and contenders."""

    def __init__(self, case: Case):
        self.case, self.rng = case, np.random.default_rng(SEED)
        self.block = self._normal(min(BLOCK, math.prod(case.dims)))
        self.scale, self.bias = (self._normal(case.channels) for _ in range(2))
        self.x = [self._buffer() for _ in range(case.buffers)]
        self.dy = [self._buffer() for _ in range(case.buffers if case.both else 0)]
        self.makers: dict[str, Callable[[], Call]] = {OURS: self._ours, TEXTBOOK: self._textbook}

    def _normal(self, size: int) -> Any:
        drawn = self.rng.standard_normal(size, np.float32)
        return cupy.asarray(drawn.astype(dtype_of(self.case.dtype)))

    def _buffer(self) -> Any:
        dims = self.case.array_dims
        many = -(-math.prod(dims) // self.block.size)
        return cupy.tile(self.block, many)[: math.prod(dims)].reshape(dims).copy()

    def _ours(self) -> Call:
        from groupnorm import GroupNorm

        first, channels = self.case.first, self.case.channels
        layer = GroupNorm(
            (channels, ...) if first else channels, feature_axis=0 if first else -1,
            num_groups=GROUPS, epsilon=EPSILON, activation=ACTIVATION, dtype="input",
            param_dtype=self.case.dtype, backend=BACKEND, implementation=IMPLEMENTATION,
        )  # fmt: skip
        layer.scale, layer.bias = self.scale, self.bias

        def both(i: int) -> tuple[Any, ...]:
            y, pullback = layer.vjp(self.x[i])
            return (y, *pullback(self.dy[i]))

        return both if self.case.both else lambda i: layer(self.x[i])

    def _textbook(self) -> Call:
        parameters = self.scale, self.bias
        if self.case.both:
            return lambda i: textbook_vjp(self.case, self.x[i], *parameters, self.dy[i])
        return lambda i: textbook(self.case, self.x[i], *parameters)


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


def textbook(case: Case, x: Any, scale: Any, bias: Any) -> Any:
    """Textbook group normalization and SiLU."""
    each = grouped_axes(case)[2]
    scale, bias = (p.astype(np.float32).reshape(each) for p in (scale, bias))
    y = normalized_parts(case, x)[0].reshape(x.shape) * scale + bias
    return (y / (1 + cupy.exp(-y))).astype(x.dtype)


def textbook_vjp(case: Case, x: Any, scale: Any, bias: Any, dy: Any) -> tuple[Any, ...]:
    """The same and its gradients, from the formula."""
    shape, axes, each = grouped_axes(case)
    others = tuple(a for a in range(x.ndim) if a != (1 if case.first else x.ndim - 1))
    wide_scale, wide_bias = (p.astype(np.float32).reshape(each) for p in (scale, bias))
    normalized, rstd = normalized_parts(case, x)
    flat = normalized.reshape(x.shape)
    z = flat * wide_scale + wide_bias
    sigmoid = 1 / (1 + cupy.exp(-z))
    dz = dy.astype(np.float32) * sigmoid * (1 + z * (1 - sigmoid))
    dscale, dbias = (dz * flat).sum(others), dz.sum(others)
    d = (dz * wide_scale).reshape(shape)
    dx = rstd * (
        d - d.mean(axes, keepdims=True) - normalized * (d * normalized).mean(axes, keepdims=True)
    )
    found = (z * sigmoid, dx.reshape(x.shape), dscale, dbias)
    return tuple(a.astype(x.dtype) for a in found)


# ---- timers -------------------------------------------------------------------------------------


def timers(name: str, call: Call, count: int) -> dict[str, Timer]:
    return both_timers(name, call, count, graphed, timed)


def captured(call: Call, count: int) -> tuple[list[Any], Any, Any]:
    """The results of a graph of one call for each buffer, the graph and its stream.

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
    return [pool, *kept], graph, stream


def graphed(call: Call, count: int) -> Timer:
    """Launches of a graph of one call for each buffer; every call has a separate result."""
    kept, graph, stream = captured(call, count)

    def run(repeats: int) -> float:
        assert kept
        return timed(lambda: [graph.launch(stream) for _ in range(repeats)], stream)

    return Timer("CUDA graph", run, count)


def timed(work: Callable[[], Any], stream: Any = None) -> float:
    """Microseconds on the device between start and end of some work."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.runtime.deviceSynchronize()
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return 1e3 * cupy.cuda.get_elapsed_time(start, end)


def copy_timer(size: int, count: int) -> Timer:
    sources = [cupy.zeros(size // 2, np.uint16) for _ in range(count)]
    targets = [cupy.empty_like(source) for source in sources]
    return graphed(lambda i: cupy.copyto(targets[i], sources[i]), count)
