"""The rows of gpu.py, in order of importance, and their lower bounds by memory bandwidth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The most important first: when time is short, rows are left out from the end.
SHAPES = {
    "UNet 16x320@64x64": (16, 320, 64, 64),
    "VAE 1x512@256x256": (1, 512, 256, 256),
    "video VAE 1x128@20x256x256": (1, 128, 20, 256, 256),
    "ResNet-50 32x256@56x56": (32, 256, 56, 56),
    "UNet 2x320@32x32": (2, 320, 32, 32),
    "VAE 1x512@512x512": (1, 512, 512, 512),
    "UNet 16x1280@16x16": (16, 1280, 16, 16),
    "ResNet-50 256x64@112x112": (256, 64, 112, 112),
    "UNet 2x1280@8x8": (2, 1280, 8, 8),
}
QUICK = ("UNet 16x320@64x64", "VAE 1x512@256x256", "UNet 2x320@32x32")
FIRST, LAST = LAYOUTS = ("channels-first", "channels-last")
FORWARD, BOTH = PASSES = ("forward", "forward+backward")
TORCH, JAX, CUPY = LIBRARIES = ("torch", "jax", "cupy")
GROUPS = 32
EPSILON = 1e-6
ACTIVATION = "silu"
ITEM = 2  # bytes of a bfloat16, or a float16
SEED = 20240607

# The buffers of a row exceed every second-level cache.
ROTATED_BYTES = 120_000_000
FEWEST_BUFFERS, MOST_BUFFERS = 2, 512

OURS, PORTABLE = "groupnorm", "groupnorm portable"
EAGER, COMPILED, APEX = "eager", "compile", "apex"
FLAX, FLAX_TWO_PASSES = "flax nnx", "flax nnx, use_fast_variance=False"
TEXTBOOK = "textbook"
UNGRAPHED = ", no graph"
# The reference for our result in each row.
PEER = {TORCH: EAGER, JAX: FLAX_TWO_PASSES, CUPY: TEXTBOOK}

# Bytes moved, as multiples of the size of x.
TRAFFIC = {
    "forward": {"one_read": 2, "two_read": 3},
    "backward": {"one_read": 3, "two_read": 5},
}


class LeftOut(Exception):
    """Why a contender is left out."""


@dataclass(frozen=True)
class Case:
    """One row: task, shape, layout, dtype and library."""

    library: str
    task: str
    shape: str
    layout: str
    dims: tuple[int, ...]  # (N, C, *spatial), whatever the layout

    @property
    def name(self) -> str:
        return f"{self.library}/{self.shape}/{self.layout}/{self.task}"

    @property
    def first(self) -> bool:
        return self.layout == FIRST

    @property
    def both(self) -> bool:
        return self.task == BOTH

    @property
    def channels(self) -> int:
        return self.dims[1]

    @property
    def bytes(self) -> int:
        return ITEM * math.prod(self.dims)

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


def plan(library: str, quick: bool) -> list[Case]:
    """The rows of a library, the most important first."""
    return [
        Case(library, task, shape, layout, SHAPES[shape])
        for shape, layout, task in itertools.product(QUICK if quick else SHAPES, LAYOUTS, PASSES)
    ]


def kernels(case: Case) -> dict[str, Any]:
    """The plans of our kernels forward and backward, and their numbers of launches."""
    try:
        from groupnorm.backends.kernels.gpu import program as gpu
        from groupnorm.backends.kernels.grouped_shape import GroupedShape

        samples, channels, *space = case.dims
        form = GroupedShape(
            samples, GROUPS, channels // GROUPS, math.prod(space), case.first, ITEM
        )  # fmt: skip
        waves = case.library != JAX
        asked = gpu.KernelOptions(EPSILON, ACTIVATION, None, True, True, waves)
        programs = {"forward": gpu.forward(form, asked), "backward": gpu.backward(form, asked)}
    except Exception as error:  # another version of the library: then floors assume two reads
        why = f"{type(error).__name__}: {error}"
        return {"plan": {"forward": None, "backward": None}, "planned_launches": None, "why": why}
    steps = {name: [step.kernel for step in program.launches] for name, program in programs.items()}
    counted = steps if case.both else {"forward": steps["forward"]}
    return {
        "plan": {name: plan_of(names) for name, names in steps.items()},
        "planned_launches": sum(map(len, counted.values())),
    }


def plan_of(names: list[str]) -> str:
    """A reads once, B twice, C twice in waves that fit the cache."""
    if "whole" in names:
        return "A"
    return "C" if names.count("measure") > 1 else "B"


def floors(
    size: int, task: str, plans: Mapping[str, str | None], bytes_per_second: float
) -> dict[str, float]:
    """Microseconds to move the bytes: with x read once, twice, or as the plans do."""
    passes = ("forward", "backward") if task == BOTH else ("forward",)
    reads = {name: "one_read" if plans.get(name) == "A" else "two_read" for name in passes}
    times = {
        "one_read": sum(TRAFFIC[name]["one_read"] for name in passes),
        "two_read": sum(TRAFFIC[name]["two_read"] for name in passes),
        "plan": sum(TRAFFIC[name][reads[name]] for name in passes),
    }
    return {name: 1e6 * count * size / bytes_per_second for name, count in times.items()}


def bandwidth_for(size: int, copies: Mapping[str, float]) -> float:
    """Bytes per second of the copy whose size is nearest, by ratio; keys are bytes as text."""
    nearest = min(copies, key=lambda text: abs(math.log(int(text) / size)))
    return copies[nearest]
