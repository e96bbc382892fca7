"""What stands for a GPU in a dry run (DRY=1), so that the scripts for GPUs can be tried without.

PyTorch's kernels are interpreted by Triton, as in ``pytest --interpret``. NumPy stands for CuPy,
and JAX computes on the CPU. A graph keeps the results of its capture, and replaying it does
nothing: times mean nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

NAME = "no GPU, a dry run"


def interpret() -> None:
    """Have PyTorch's CPU tensors computed by the GPU kernels, interpreted."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    importlib.import_module("tests.interpreter").interpret()


def nothing(*_: Any, **__: Any) -> None:
    pass


class Graph:
    replay = launch = nothing


class Stream(contextlib.nullcontext):
    def __init__(self, non_blocking: bool = True):
        super().__init__()

    wait_stream = synchronize = begin_capture = nothing

    def end_capture(self) -> Graph:
        return Graph()


class Event:
    def __init__(self, enable_timing: bool = True):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    synchronize = nothing

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def context(*_: Any) -> contextlib.nullcontext:
    return contextlib.nullcontext()


torch_cuda = SimpleNamespace(
    Stream=Stream, Event=Event, CUDAGraph=Graph, stream=context, graph=context,
    current_stream=Stream, synchronize=nothing, empty_cache=nothing,
    is_available=lambda: True, get_device_name=lambda index: NAME,
)  # fmt: skip


class Cupy:
    """NumPy, with what the scripts use of `cupy.cuda`."""

    __version__ = NAME
    cuda = SimpleNamespace(
        Stream=Stream, Event=Event, MemoryPool=lambda: SimpleNamespace(malloc=None),
        using_allocator=context, set_allocator=nothing, get_elapsed_time=Event.elapsed_time,
        runtime=SimpleNamespace(
            getDeviceCount=lambda: 1, deviceSynchronize=nothing, CUDARuntimeError=OSError,
            getDeviceProperties=lambda index: {"name": NAME.encode()},
        ),
    )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_all_blocks=nothing)
