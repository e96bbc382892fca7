"""The contenders of gpu.py in PyTorch: F.group_norm and F.silu, eager and compiled, apex, ours.

Calls are captured into a CUDA graph, one call for each buffer, and the graph is replayed; they are
also timed without a graph, which includes the host's time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _gpu_cases import (
    ACTIVATION,
    APEX,
    COMPILED,
    EAGER,
    EPSILON,
    GROUPS,
    OURS,
    SEED,
    Case,
    LeftOut,
)
from _gpu_measure import Call, Timer, both_timers, elements, graph_launches, named

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def missing() -> str | None:
    """Why there is no usable GPU, or None."""
    if torch.version.cuda is None:
        return "PyTorch is built without CUDA"
    return None if torch.cuda.is_available() else "PyTorch finds no GPU"


def gpu_name() -> str:
    return torch.cuda.get_device_name(0)


def release() -> None:
    """Release memory between rows, and reset Dynamo.

    Dynamo gives up on a function after 8 shapes and silently runs it uncompiled.
    """
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait() -> None:
    torch.cuda.synchronize()


class Contest:
    """A row's buffers and contenders."""

    dtype = "bfloat16"

    def __init__(self, case: Case, device: str = "cuda", implementation: str | None = "fused"):
        self.case, self.device = case, device
        torch.set_grad_enabled(case.both)
        torch.manual_seed(SEED)
        parameter = {"dtype": torch.bfloat16, "device": device, "requires_grad": case.both}
        self.weight, self.bias = (torch.randn(case.channels, **parameter) for _ in range(2))
        self.x = [self._buffer().requires_grad_(case.both) for _ in range(case.buffers)]
        self.dy = [self._buffer() for _ in range(case.buffers if case.both else 0)]
        self.makers: dict[str, Callable[[], Call]] = {
            OURS: lambda: self._ours(implementation),
            EAGER: lambda: self._call(self._functional, self.weight, self.bias),
            COMPILED: self._compiled,
            APEX: self._apex,
        }

    def _buffer(self) -> torch.Tensor:
        """A tensor (N, C, *spatial) in the memory format of the row."""
        made = torch.randn(self.case.array_dims, dtype=torch.bfloat16, device=self.device)
        return made if self.case.first else made.movedim(-1, 1)

    def _call(self, norm: Callable[..., Any], *parameters: Any) -> Call:
        """A call of `norm`, with the gradients of x and `parameters` if requested."""
        if not self.case.both:
            return lambda i: norm(self.x[i])

        def both(i: int) -> tuple[Any, ...]:
            y = norm(self.x[i])
            gradients = torch.autograd.grad(y, (self.x[i], *parameters), self.dy[i])
            return (y.detach(), *gradients)

        return both

    def _functional(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.group_norm(x, GROUPS, self.weight, self.bias, EPSILON)
        return torch.nn.functional.silu(y)

    def _compiled(self) -> Call:
        compiled = torch.compile(self._functional, fullgraph=True, dynamic=False)
        return self._call(compiled, self.weight, self.bias)

    def _apex(self) -> Call:
        from apex.contrib.group_norm import GroupNorm

        if self.case.first or len(self.case.dims) != 4:
            raise LeftOut("apex is for images whose channels are last")
        layer = GroupNorm(
            GROUPS, self.case.channels, eps=EPSILON, act=ACTIVATION, device=self.device,
            dtype=torch.bfloat16,
        )  # fmt: skip
        return self._call(self._filled(layer), layer.weight, layer.bias)

    def _ours(self, implementation: str | None) -> Call:
        from groupnorm import GroupNorm

        layer = GroupNorm(
            (self.case.channels, ...), feature_axis=0, num_groups=GROUPS, epsilon=EPSILON,
            activation=ACTIVATION, dtype="input", param_dtype="bfloat16", backend="torch",
            implementation=implementation,
        )  # fmt: skip
        layer = self._filled(layer.to(self.device))
        return self._call(layer, layer.weight, layer.bias)

    def _filled(self, layer: Any) -> Any:
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            layer.bias.copy_(self.bias)
        return layer

    def fallback(self) -> Call:
        return self._ours("portable")

    def timers(self, name: str, call: Call) -> dict[str, Timer]:
        return both_timers(name, call, self.case.buffers, graphed, evented)

    def differences(self, found: Any, expected: Any) -> dict[str, float]:
        return {name: difference(a, b) for name, a, b in named(found, expected, self.case)}

    def wait(self) -> None:
        if self.device != "cpu":
            wait()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference; for sums over the samples, relative to their largest."""
    a, b = a.detach().float(), b.detach().float()
    largest = b.abs().max().clamp(min=1) if b.ndim == 1 else b.abs().clamp(min=1)
    return ((a - b).abs() / largest).max().item()


# ---- timers -------------------------------------------------------------------------------------


def graphed(call: Call, count: int) -> Timer:
    """Replays of a graph of one call for each buffer; every call has a separate result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(count, 3)):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(count)]
    nodes = graph_launches(graph.raw_cuda_graph())
    graph.instantiate()
    del kept  # the graph keeps the memory

    def run(repeats: int) -> float:
        return timed(lambda: [graph.replay() for _ in range(repeats)])

    return Timer("CUDA graph", run, count, None if nodes is None else nodes / count)


def evented(call: Call, count: int) -> Timer:
    """Calls one after the other, including the host's time if that is longer."""

    def calls(repeats: int) -> None:
        kept = [None] * count
        for _ in range(repeats):
            for i in range(count):
                kept[i] = call(i)

    return Timer("CUDA events", lambda repeats: timed(lambda: calls(repeats)), count)


def timed(work: Callable[[], Any]) -> float:
    """Microseconds on the device between start and end of some work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def copy_timer(size: int, count: int) -> Timer:
    sources = [
        torch.ones(elements(size), dtype=torch.bfloat16, device="cuda") for _ in range(count)
    ]
    targets = [torch.empty_like(source) for source in sources]

    def call(i: int) -> None:
        targets[i].copy_(sources[i])

    try:
        return graphed(call, count)
    except Exception:
        return evented(call, count)


# ---- checks -------------------------------------------------------------------------------------


def vjp(arrays: dict[str, Any], dtype: str, first: bool, options: dict[str, Any],
        device: str = "cuda") -> list[np.ndarray]:  # fmt: skip
    """Y and the gradients of x, scale and bias as NumPy's float32, by `group_norm_vjp`.

    NumPy arrays: x, dy (N, C, *spatial), scale, bias, and mask (N, 1, *spatial) or None.
    """
    from groupnorm import group_norm_vjp

    def put(name: str) -> torch.Tensor:
        a = torch.tensor(arrays[name], device=device).to(getattr(torch, dtype))
        return a if first or a.ndim == 1 else a.contiguous(memory_format=FORMATS[a.ndim])

    x, dy, scale, bias = map(put, ("x", "dy", "scale", "bias"))
    mask = arrays["mask"]
    mask = None if mask is None else torch.tensor(mask, device=device)
    y, pullback = group_norm_vjp(x, scale, bias, mask=mask, feature_axis=1, **options)
    found = [y, *pullback(dy)]
    return [np.array(a.detach().float().cpu().numpy()) for a in found]
