"""What cpu.py measures: shapes, the rows of its tables, their inputs, and the right results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHAPES = {
    "ResNet": (8, 64, 56, 56),
    "UNet": (4, 320, 64, 64),
    "late": (32, 256, 14, 14),
    "VAE": (1, 128, 512, 512),
    "small": (16, 32, 8, 8),
    "speech": (4, 512, 8000),
    "video": (1, 128, 8, 64, 64),
    "tiny": (2, 32, 4, 4),  # for the call overhead only
    "many groups": (100_000, 8),  # one position
}
MEASURED = tuple(name for name in SHAPES if name not in ("tiny", "many groups"))
QUICK = ("ResNet", "small")
FIRST, LAST = LAYOUTS = ("channels-first", "channels-last")
FORWARD, BOTH, MASKED, SILU = TASKS = (
    *("forward", "forward+backward", "masked forward", "forward with silu"),
)
NUMPY, TORCH, JAX = FRAMEWORKS = ("NumPy", "PyTorch", "JAX")
GROUPS = 32
EPSILON = 1e-6
SEED = 20240607
VALID = 0.8  # the fraction of valid positions in a mask

# The names that the tables, the targets and the plots share.
LIMIT, TEXTBOOK, OURS, PORTABLE = "copy", "textbook", "ours", "ours portable"
NATIVE, COMPILED, NNX, KERAS = "F.group_norm", "compiled textbook", "flax nnx", "keras"

Array = np.ndarray
Call = Callable[[], Any]
Maker = Callable[[], Call]


class LeftOut(Exception):
    """Why a contender is left out."""


@dataclass(frozen=True)
class Case:
    """One row: task, shape, layout, dtype and framework."""

    framework: str
    task: str
    shape: str
    layout: str
    dtype: str = "float32"
    groups: int = GROUPS

    @property
    def name(self) -> str:
        parts = (self.framework, self.task, self.shape, self.layout, self.dtype)
        return "/".join([*parts, f"{self.groups} groups"])

    @property
    def label(self) -> str:
        """The label that distinguishes this row in its table."""
        extra = "" if self.dtype == "float32" else f" {self.dtype}"
        if self.groups != GROUPS:
            extra += f" {self.groups} group{'s' if self.groups > 1 else ''}"
        return self.shape + extra

    @property
    def dims(self) -> tuple[int, ...]:
        """(N, C, *spatial), whatever the layout."""
        return SHAPES[self.shape]

    @property
    def channels(self) -> int:
        return self.dims[1]

    @property
    def is_main(self) -> bool:
        """Whether geometric means over shapes include it: float32 in 32 groups."""
        return self.dtype == "float32" and self.groups == GROUPS


@dataclass
class Data:
    """Inputs in float32, in the memory order of the layout; exact in the row's dtype.

    `x` and `dy` are (N, C, *spatial) or (N, *spatial, C); `mask` has 1 for the channels.
    """

    x: Array
    scale: Array
    bias: Array
    dy: Array | None = None
    mask: Array | None = None


@dataclass
class Contest:
    """The contenders of one row, and how to read what they return.

    A maker returns the call to time. A contender whose maker or call raises is left out. A call
    returns y, or (y, dx, ...) if the task includes the gradient; `read` converts the first sample
    of these two to NumPy arrays (channels of the first group, *spatial).
    """

    makers: dict[str, Maker]
    read: Callable[[Any], list[Array]]
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


def plan(quick: bool) -> list[Case]:
    """All rows, those of one table together.

    Forward and forward+backward in float32 on every shape in both layouts; the rest on a few:
    1 and C groups forward on ResNet; many small groups in PyTorch; masked forward on ResNet, UNet
    and speech; silu and 16-bit on ResNet and UNet.
    """
    cases = [case for framework in FRAMEWORKS for case in cases_of(framework, quick)]
    place = {name: number for number, name in enumerate((*FRAMEWORKS, *TASKS))}
    return sorted(cases, key=lambda case: (place[case.framework], place[case.task]))


def cases_of(framework: str, quick: bool) -> Iterator[Case]:
    for task, shape, layout in itertools.product(
        (FORWARD, BOTH), QUICK if quick else MEASURED, LAYOUTS
    ):
        yield Case(framework, task, shape, layout)
    if not quick:
        for groups, layout in itertools.product((1, SHAPES["ResNet"][1]), LAYOUTS):
            yield Case(framework, FORWARD, "ResNet", layout, groups=groups)
    if framework == TORCH:
        for task in (FORWARD, BOTH):
            yield Case(framework, task, "many groups", FIRST, groups=2)
    layouts = (LAST,) if quick else LAYOUTS
    for task, shapes in {MASKED: ("ResNet", "UNet", "speech"), SILU: ("ResNet", "UNet")}.items():
        for shape, layout in itertools.product(shapes[:1] if quick else shapes, layouts):
            yield Case(framework, task, shape, layout)
    if framework != JAX:
        yield from half_cases(framework, quick)


def half_cases(framework: str, quick: bool) -> Iterator[Case]:
    """The 16-bit rows; with backward in PyTorch only, where 16-bit training is common."""
    if quick:
        yield Case(framework, FORWARD, "ResNet", LAST, "bfloat16")
        return
    tasks = (FORWARD, BOTH) if framework == TORCH else (FORWARD,)
    for task, dtype, shape, layout in itertools.product(
        tasks, ("bfloat16", "float16"), ("ResNet", "UNet"), LAYOUTS
    ):
        yield Case(framework, task, shape, layout, dtype)


def numpy_dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def make_data(case: Case) -> Data:
    """The inputs of a row, the same in every framework."""
    rng = np.random.default_rng(SEED)
    first = case.layout == FIRST
    samples, channels, *space = case.dims
    shape = (samples, channels, *space) if first else (samples, *space, channels)
    positions = (samples, 1, *space) if first else (samples, *space, 1)

    def normal(shape: tuple[int, ...]) -> Array:
        values = rng.standard_normal(shape, dtype=np.float32)
        if case.dtype == "float32":
            return values
        return values.astype(numpy_dtype(case.dtype)).astype(np.float32)

    return Data(
        x=normal(shape),
        scale=normal((channels,)),
        bias=normal((channels,)),
        dy=normal(shape) if case.task == BOTH else None,
        mask=rng.random(positions) < VALID if case.task == MASKED else None,
    )


# ---- what is right ------------------------------------------------------------------------------


def first_group(array: Array, case: Case, channel_axis: int) -> Array:
    """The first sample's first group of a NumPy array, channels first, in float64."""
    channels_first = np.moveaxis(array[0], channel_axis - (channel_axis > 0), 0)
    return channels_first[: case.channels // case.groups].astype(np.float64)


def truth(case: Case, data: Data) -> list[Array]:
    """Y and, if requested, dx of the first group of the first sample, in float64."""
    axis = 1 if case.layout == FIRST else -1
    x = first_group(data.x, case, axis)
    # A mask has one channel: with num_groups equal to the channels, that is its first group.
    keep = np.ones_like(x) if data.mask is None else np.moveaxis(data.mask[0], axis - (axis > 0), 0)
    keep = np.broadcast_to(keep, x.shape)
    count = keep.sum()
    mean = (x * keep).sum() / count
    rstd = 1 / np.sqrt((((x - mean) ** 2) * keep).sum() / count + EPSILON)
    each = (-1,) + (1,) * (x.ndim - 1)
    scale, bias = (p[: len(x)].astype(np.float64).reshape(each) for p in (data.scale, data.bias))
    normalized = (x - mean) * rstd
    y = normalized * scale + bias
    if case.task == SILU:
        y = y / (1 + np.exp(-y))
    if data.dy is None:
        return [y]
    d = first_group(data.dy, case, axis) * scale
    return [y, rstd * (d - d.mean() - normalized * (d * normalized).mean())]


def wrongness(found: list[Array], expected: list[Array]) -> float | None:
    """Largest error of y and dx, relative to the value or 1 where that is larger; None for NaN."""
    pairs = zip(found, expected, strict=True)
    error = np.max([np.max(np.abs(f - e) / np.maximum(1, np.abs(e))) for f, e in pairs])
    return float(error) if np.isfinite(error) else None
