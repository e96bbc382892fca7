"""Host time of PyTorch calls of the GPU kernels: without a GPU, on a stand-in for CUDA's driver.

The driver is ``tests/kernels/driver_stand_in.c``, which launches nothing. The tensors are on the
CPU, and the GPU engine is called for them, so allocations are those of PyTorch's CPU allocator.
What the real driver takes for a launch (2 to 3 us) is not included, and neither is the change of
threads in the backward pass of tensors on a GPU. Beside our launcher, in turns:

- Triton's: its launcher of jitted functions, ending in a function that does nothing;
- PyTorch's: autograd functions of the same inputs and outputs that compute nothing, the least that
  a layer written in Python takes.

Shapes are small, since the CPU allocator maps large memory anew for each call. Figures are CPU
microseconds of the calling thread a call, minimum and median of the rounds. It needs PyTorch and
Triton (``pip install '.[torch,gpu]'``), and a C compiler::

    python benchmarks/gpu_host_time.py [--rounds N] [--calls N] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import torch
    import triton  # noqa: F401 - for what is imported below
except ImportError as error:
    print(
        f"gpu_host_time.py needs PyTorch and Triton ({error}): pip install '.[torch,gpu]'",
        file=sys.stderr,
    )
    sys.exit(2)
from _report import machine, print_table, versions, write_json

sys.path.insert(0, str(Path(__file__).parents[1]))
from groupnorm import GroupNorm
from groupnorm.backends.kernels.gpu import driver as gpu_driver
from groupnorm.backends.kernels.gpu.build import kernel_of
from groupnorm.backends.torch import gpu as torch_gpu
from groupnorm.backends.torch import kernels as torch_kernels
from tests.kernels.stand_in import StandIn, compile_stand_in

PRIMARY = 0x1000  # the stand-in's context of device 0
GROUPS = 32
# Shape, and the number of launches of the forward and of the backward pass.
SHAPES = {"one kernel": (2, 64, 8, 8), "several kernels": (1, 32, 256, 256)}
OURS, TRITON, NOTHING = "ours", "Triton's launcher", "no computation"


class Engine(torch_gpu.GpuEngine):
    """The GPU engine, for tensors on the CPU."""

    def why_unavailable(self, device):
        return None

    def prepare(self, sequence, dtypes, device):
        return super().prepare(sequence, dtypes, 0)


class JitEngine(Engine):
    """The same, launching as Triton does."""

    def prepare(self, sequence, dtypes, device):
        steps = [
            (
                kernel_of(launch.module, launch.kernel)[launch.grid], launch.arrays,
                {**dict(launch.scalars), **dict(launch.constants), "num_warps": launch.warps,
                 "enable_fp_fusion": True},
            )
            for launch in sequence.launches
        ]  # fmt: skip

        def launch(*arrays):
            there = dict(zip(dtypes, arrays, strict=True))
            x = there["x"]
            for name, elements in sequence.shared:
                there[name] = x.new_empty(elements, dtype=torch.float32)
            for kernel, names, keywords in steps:
                pointers = [x if (a := there.get(name)) is None else a for name in names]
                kernel(*pointers, **keywords)

        return launch


def launch_nothing_with_triton() -> None:
    """Give Triton a driver whose launcher does nothing."""
    compiler: Any = importlib.import_module("triton.backends.compiler")
    runtime: Any = importlib.import_module("triton.runtime")

    class Utilities:
        def load_binary(self, *_):
            return 0, 0, 32, 0, 1024

        def get_device_properties(self, device):
            return {"max_shared_mem": 232448}

    class Launcher:
        global_scratch_size = 0

        def __init__(self, source, metadata):
            self.launch = None

        def __call__(self, *_):
            pass

    class Driver:
        utils, launcher_cls = Utilities(), Launcher

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_current_target(self):
            return compiler.GPUTarget("cuda", 90, 32)

    runtime.driver.set_active(Driver())


class Nothing(torch.autograd.Function):
    """Returns what the kernels would, and computes nothing."""

    @staticmethod
    def forward(ctx, x, scale, bias):
        ctx.save_for_backward(x, scale, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(a) for a in ctx.saved_tensors)


class NothingLayer(torch.nn.Module):
    """A layer that computes nothing."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        if torch.is_grad_enabled():
            return Nothing.apply(x, self.weight, self.bias)
        return torch.empty_like(x)


def call_of(layer: Any, task: str, shape: tuple[int, ...]) -> Callable[[], Any]:
    x = torch.ones(shape, dtype=torch.bfloat16)
    if task == "forward":

        def forward():
            with torch.no_grad():
                return layer(x)

        return forward
    dy = torch.ones_like(x)
    given = (x.requires_grad_(), layer.weight, layer.bias)
    return lambda: torch.autograd.grad(layer(x), given, dy)


def timed(call: Callable[[], Any], engine: Any, calls: int) -> float:
    """CPU microseconds a call of this thread."""
    torch_kernels.engine_for = lambda device: engine
    begun = time.thread_time_ns()
    for _ in range(calls):
        call()
    return (time.thread_time_ns() - begun) / calls / 1e3


def measured(task: str, shape: tuple[int, ...], rounds: int, calls: int) -> dict[str, Any]:
    layer = GroupNorm(
        (shape[1], ...), feature_axis=0, num_groups=GROUPS, activation="silu", backend="torch",
        dtype="input",
    )  # fmt: skip
    contenders = {OURS: (layer, Engine()), TRITON: (layer, JitEngine())}
    contenders[NOTHING] = (NothingLayer(layer), None)
    made = {name: (call_of(layer, task, shape), e) for name, (layer, e) in contenders.items()}
    found: dict[str, list[float]] = {name: [] for name in made}
    for call, engine in made.values():
        timed(call, engine, 20)  # compiles
    for _ in range(rounds):
        for name, (call, engine) in made.items():
            found[name].append(timed(call, engine, calls))
    return {
        name: {"min": round(min(us), 1), "median": round(statistics.median(us), 1)}
        for name, us in found.items()
    }


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    many = {"type": positive, "metavar": "N"}
    parser.add_argument("--rounds", **many, default=15, help="of all contenders, default 15")
    parser.add_argument("--calls", **many, default=300, help="of each in a round, default 300")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stand_in = StandIn(compile_stand_in(Path(folder)))
        gpu_driver._LIBRARY = stand_in.path
        stand_in.reset(recording=False)
        stand_in.context = PRIMARY
        torch_gpu.current_stream = lambda device: 0
        launch_nothing_with_triton()
        records = [
            {"shape": shape, "plan": plan, "task": task}
            | measured(task, shape, arguments.rounds, arguments.calls)
            for plan, shape in SHAPES.items()
            for task in ("forward", "forward+backward")
        ]
    rows = [
        [f"{record['task']}, {record['plan']}"]
        + [f"{record[n]['min']} ({record[n]['median']})" for n in (OURS, TRITON, NOTHING)]
        for record in records
    ]
    # Those of the measurement; PyTorch may have others, which are idle.
    threads = f"{torch.get_num_threads()} thread of PyTorch, {threading.active_count()} of Python"
    print_table(
        f"CPU us a call of PyTorch's layer, minimum (median); {threads}",
        ["call", OURS, TRITON, NOTHING],
        rows,
    )
    found = versions("torch", "triton", "groupnorm")
    write_json(arguments.json, {"records": records, "versions": found, "machine": machine()})


if __name__ == "__main__":
    main()
