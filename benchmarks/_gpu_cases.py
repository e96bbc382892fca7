"""The rows of gpu.py, the most important first, and the bytes that they move."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Tries the benchmark's and the first run's code where there is no GPU: tiny arrays, and what
# _gpu_dry.py has in place of a device.
DRY = bool(os.environ.get("DRY"))

# (N, C, *spatial) and dtype. The first three come first; what there is no time for is left out
# from the end.
SHAPES = {
    "UNet 16x320@64x64": ((16, 320, 64, 64), "bfloat16"),
    "VAE 1x512@256x256": ((1, 512, 256, 256), "bfloat16"),
    "UNet 2x320@32x32": ((2, 320, 32, 32), "bfloat16"),
    "ResNet-50 32x256@56x56": ((32, 256, 56, 56), "bfloat16"),
    "UNet 16x1280@16x16": ((16, 1280, 16, 16), "bfloat16"),
    "UNet 16x320@64x64 float32": ((16, 320, 64, 64), "float32"),
}
QUICK = 1 if DRY else 3
MEASURED = [name for name in SHAPES if not DRY or name.startswith("UNet 16x320")]
FIRST, LAST = LAYOUTS = ("channels-first", "channels-last")
FORWARD, BOTH = PASSES = ("forward", "forward+backward")
TORCH, JAX, CUPY = LIBRARIES = ("torch", "jax", "cupy")
GROUPS = 2 if DRY else 32
EPSILON = 1e-6
ACTIVATION = "silu"
SEED = 20240607

# The buffers of a row exceed every second-level cache.
ROTATED_BYTES = 120_000_000
FEWEST_BUFFERS, MOST_BUFFERS = 2, 2 if DRY else 512

OURS, EAGER, COMPILED, FLAX, TEXTBOOK = "groupnorm", "eager", "compile", "flax nnx", "textbook"
UNGRAPHED = ", no graph"
# The reference for our result in each row.
PEER = {TORCH: EAGER, JAX: FLAX, CUPY: TEXTBOOK}

# How often memory of x's size is read or written at least.
LEAST_TRAFFIC = {"forward": 2, "backward": 3}


@dataclass(frozen=True)
class Case:
    """One row: library, shape, layout and task."""

    library: str
    task: str
    shape: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.library}/{self.shape}/{self.layout}/{self.task}"

    @property
    def dims(self) -> tuple[int, ...]:
        """(N, C, *spatial), whatever the layout."""
        return tiny(SHAPES[self.shape][0]) if DRY else SHAPES[self.shape][0]

    @property
    def dtype(self) -> str:
        return SHAPES[self.shape][1]

    @property
    def first(self) -> bool:
        return self.layout == FIRST

    @property
    def both(self) -> bool:
        return self.task == BOTH

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.both else ("forward",)

    @property
    def channels(self) -> int:
        return self.dims[1]

    @property
    def item(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def bytes(self) -> int:
        return self.item * math.prod(self.dims)

    @property
    def buffers(self) -> int:
        """The number of input buffers that the calls of this row cycle through."""
        wanted = -(-ROTATED_BYTES // self.bytes)
        return min(max(wanted, FEWEST_BUFFERS), MOST_BUFFERS)

    @property
    def array_dims(self) -> tuple[int, ...]:
        """The shape of an array with its axes in the memory order of the layout."""
        samples, channels, *space = self.dims
        return self.dims if self.first else (samples, *space, channels)


def tiny(dims: tuple[int, ...]) -> tuple[int, ...]:
    samples, channels, *space = dims
    return (min(samples, 1), min(channels, 8), *(min(size, 4) for size in space))


def plan(library: str) -> list[Case]:
    """The rows of a library: of the quick shapes first, forward before both passes."""
    found = [
        Case(library, task, shape, layout)
        for shapes in (MEASURED[:QUICK], MEASURED[QUICK:])
        for task, shape, layout in itertools.product(PASSES, shapes, LAYOUTS)
    ]
    return found[::3] if DRY else found  # each shape, layout and pass is there once


def planned(case: Case) -> dict[str, Any]:
    """The launches of our kernels, by direction."""
    from groupnorm.backends.kernels.gpu import program as gpu

    options = gpu.KernelOptions(EPSILON, ACTIVATION, None, True, True)
    shape = grouped(case)
    made = {"forward": gpu.forward(shape, options), "backward": gpu.backward(shape, options)}
    return {name: made[name] for name in case.directions}


def grouped(case: Case) -> Any:
    """The row's shape as the kernels see it."""
    from groupnorm.backends.kernels.grouped_shape import GroupedShape

    samples, channels, *space = case.dims
    size = channels // GROUPS
    return GroupedShape(samples, GROUPS, size, math.prod(space), case.first, case.item)


def traffic(launch: Any) -> int:
    """How many arrays of x's size a launch reads and writes.

    What it reads again comes from the cache.
    """
    return len({"x", "dy", "y", "dx"}.intersection(launch.arrays))


def reads(case: Case) -> dict[str, int]:
    """The traffic of a row: the least that is possible, and that of our launches."""
    launches = [step for program in planned(case).values() for step in program.launches]
    return {
        "one_read": sum(LEAST_TRAFFIC[name] for name in case.directions),
        "plan": sum(map(traffic, launches)),
        "launches": len(launches),
    }


def bandwidth_for(size: int, copies: Mapping[str, float]) -> float:
    """Bytes per second of the copy whose size is nearest, by ratio; keys are bytes as text."""
    nearest = min(copies, key=lambda text: abs(math.log(int(text) / size)))
    return copies[nearest]
