"""The contenders of gpu.py in PyTorch: F.group_norm and F.silu, eager and compiled, and ours.

Calls are captured into a CUDA graph, one call for each buffer, and the graph is replayed; they are
also timed without a graph, which includes the host's time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from _gpu_cases import ACTIVATION, COMPILED, DRY, EAGER, EPSILON, GROUPS, OURS, SEED, Case
from _gpu_measure import Call, Timer, both_timers

BACKEND, DEVICE, COMPILER = "torch", "cuda", "inductor"
cuda: Any = torch.cuda
if DRY:
    import _gpu_dry

    cuda, DEVICE, COMPILER = _gpu_dry.torch_cuda, "cpu", "aot_eager"
    _gpu_dry.interpret()


def missing() -> str | None:
    """Why there is no usable GPU, or None."""
    return None if cuda.is_available() else "PyTorch finds no GPU"


def gpu_name() -> str:
    return cuda.get_device_name(0)


def release() -> None:
    """Release memory between rows, and reset Dynamo.

    Dynamo gives up on a function after 8 shapes and silently runs it uncompiled.
    """
    gc.collect()
    torch.compiler.reset()
    cuda.empty_cache()


def wait() -> None:
    cuda.synchronize()


class Contest:
    """A row's buffers and contenders."""

    def __init__(self, case: Case):
        self.case, self.dtype = case, getattr(torch, case.dtype)
        torch.set_grad_enabled(case.both)
        torch.manual_seed(SEED)
        parameter = {"dtype": self.dtype, "device": DEVICE, "requires_grad": case.both}
        self.weight, self.bias = (torch.randn(case.channels, **parameter) for _ in range(2))
        self.x = [self._buffer().requires_grad_(case.both) for _ in range(case.buffers)]
        self.dy = [self._buffer() for _ in range(case.buffers if case.both else 0)]
        compiled = torch.compile(self._norm, fullgraph=True, dynamic=False, backend=COMPILER)
        self.makers: dict[str, Callable[[], Call]] = {
            OURS: self._ours,
            EAGER: lambda: self._call(self._norm, self.weight, self.bias),
            COMPILED: lambda: self._call(compiled, self.weight, self.bias),
        }

    def _buffer(self) -> torch.Tensor:
        """A tensor (N, C, *spatial) in the memory format of the row."""
        made = torch.randn(self.case.array_dims, dtype=self.dtype, device=DEVICE)
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

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.group_norm(x, GROUPS, self.weight, self.bias, EPSILON)
        return torch.nn.functional.silu(y)

    def _ours(self) -> Call:
        from groupnorm import GroupNorm

        layer = GroupNorm(
            (self.case.channels, ...), feature_axis=0, num_groups=GROUPS, epsilon=EPSILON,
            activation=ACTIVATION, dtype="input", param_dtype=self.case.dtype, backend=BACKEND,
            implementation="fused",
        ).to(DEVICE)  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            layer.bias.copy_(self.bias)
        return self._call(layer, layer.weight, layer.bias)


# ---- timers -------------------------------------------------------------------------------------


def timers(name: str, call: Call, count: int) -> dict[str, Timer]:
    return both_timers(name, call, count, graphed, timed)


def graphed(call: Call, count: int) -> Timer:
    """Replays of a graph of one call for each buffer; every call has a separate result."""
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        for i in range(min(count, 3)):
            call(i)
    cuda.current_stream().wait_stream(stream)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        kept = [call(i) for i in range(count)]
    del kept  # the graph keeps the memory

    def run(repeats: int) -> float:
        return timed(lambda: [graph.replay() for _ in range(repeats)])

    return Timer("CUDA graph", run, count)


def timed(work: Callable[[], Any]) -> float:
    """Microseconds on the device between start and end of some work."""
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def copy_timer(size: int, count: int) -> Timer:
    sources = [torch.ones(size // 2, dtype=torch.bfloat16, device=DEVICE) for _ in range(count)]
    targets = [torch.empty_like(source) for source in sources]
    return graphed(lambda i: targets[i].copy_(sources[i]), count)
