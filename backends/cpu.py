"""Launches the fused CPU kernels: for NumPy arrays, and whatever shares its memory with them.

A call is served if the statistics are those of one array in memory (no replicas), real, and if in
memory order the axes are those the kernels know: samples, then channels and positions in either
order. What is not served is left to the portable implementation, with the reason.
"""

import importlib
import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from groupnorm.backends.threads import over_threads
from groupnorm.implementations import NotServed
from groupnorm.options import Options
from groupnorm.plan import Plan, make_plan, product

__all__ = [
    "ACTIVATION_NUMBERS",
    "NO_MASK",
    "Layout",
    "Saved",
    "backward",
    "flat_mask",
    "forward",
    "layout_of",
    "unavailable",
]


# A sample of up to this many elements is normalized right after it was measured, in the cache.
CACHED = 1 << 21
# Below this one thread is as fast as two that wait for each other twice.
SMALL = 1 << 17

Run = Callable[[int, int], None]  # of a range of tasks

_log = logging.getLogger("groupnorm")


class Layout(NamedTuple):
    """How a call's arrays lie in memory."""

    order: tuple[int, ...] | None  # the axes of x in memory order; None where it is x's own
    first: bool  # channels before positions
    samples: int
    groups: int
    size: int
    positions: int
    plan: Plan  # of the array in memory order
    shape: tuple[int, ...]  # of x
    feature_shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.groups * self.size

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.samples * self.channels * self.positions

    @property
    def inverse(self) -> tuple[int, ...]:
        """What brings memory order back to x's."""
        order = self.order or ()
        return tuple(order.index(a) for a in range(len(order)))


class Saved(NamedTuple):
    """What backward needs of forward, of each group in float64; and what was applied."""

    mean: Any
    rstd: Any
    share: Any
    centre: Any  # these three channels last only
    factor: Any
    term: Any


@lru_cache(maxsize=2)
def unavailable(float16: bool) -> NotServed | None:
    """Say why there are no kernels here, or none for float16, if there are none.

    This imports numba; until it is asked, nothing does.
    """
    try:
        kernels()
        rows = importlib.import_module("groupnorm.backends.kernels.numba_rows")
    except ImportError as error:
        return NotServed(
            f"the kernels for CPUs need numba, which cannot be imported ({error}); "
            'pip install "groupnorm[cpu]" brings it'
        )
    if float16 and not rows.has_float16():
        return NotServed("this CPU has no instructions for float16")
    return None


@lru_cache(maxsize=1)
def kernels() -> Any:
    """Import the kernels, where `unavailable` says nothing."""
    return importlib.import_module("groupnorm.backends.kernels.numba_cpu")


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the axes from the slowest to the fastest, if the elements lie densely; else None.

    Strides in elements.
    """
    own = tuple(range(len(shape)))
    if _dense(own, shape, strides):
        return own
    order = tuple(sorted(own, key=lambda a: -strides[a]))
    return order if _dense(order, shape, strides) else None


def _dense(order: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for axis in reversed(order):
        if shape[axis] != 1:
            if strides[axis] != expected:
                return False
            expected *= shape[axis]
    return True


@lru_cache(maxsize=4096)
def layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...], options: Options
) -> Layout | NotServed:
    """Say how the kernels see an array of this shape and memory, or why they do not.

    Raises
    ------
    ArgumentValueError
        If the axes do not fit the shape, or the channels the groups.
    """
    groups = (options.num_groups, options.group_size)
    plan = make_plan(
        shape, options.feature, *groups, options.reduction, options.feature_shape, sampled=False
    )
    if 0 in shape:
        return NotServed("there is nothing to compute")
    own = tuple(range(len(shape)))
    order = memory_order(shape, strides) or own
    features = [
        order.index(a % len(shape)) for a in sorted(a % len(shape) for a in options.feature)
    ]
    if features != sorted(features):  # channels are numbered in x's own order
        order, features = own, sorted(a % len(shape) for a in options.feature)
    reduced = tuple(i for i, a in enumerate(order) if a not in plan.kept_axes)
    there = make_plan(
        tuple(shape[a] for a in order), tuple(features), *groups, reduced, None, sampled=False
    )
    kept = {axis - (axis > there.channel) for axis in there.kept}
    roles = "".join(
        "C" if i == there.channel else "K" if i in kept else "P"
        for i in range(len(there.merged_shape))
    )
    if there.permutation is not None or roles not in ("C", "CP", "PC", "KC", "KCP", "KPC"):
        return NotServed(
            "in memory, channels and positions must each lie together after the kept axes; here "
            f"the order is {roles} (C channels, P positions, K kept axes)"
        )
    sizes = dict(zip(roles, there.merged_shape, strict=True))
    num_groups, size = there.parameter_shape[there.channel : there.channel + 2]
    return Layout(
        order=None if order == own else order,
        first=roles.endswith("CP"),
        samples=sizes.get("K", 1),
        groups=num_groups,
        size=size,
        positions=sizes.get("P", 1),
        plan=there,
        shape=shape,
        feature_shape=plan.feature_shape,
    )


def flat_mask(mask: Any, layout: Layout) -> Any:
    """Bring a boolean mask, or None, to (1 or samples, positions) bytes.

    `NotServed` where it tells channels apart, or does not broadcast.
    """
    if mask is None:
        return NO_MASK
    shape = layout.shape
    full = (1,) * (len(shape) - mask.ndim) + mask.shape
    if len(full) > len(shape) or any(m not in (1, n) for m, n in zip(full, shape, strict=True)):
        return NotServed("the mask does not broadcast to x")
    plan = layout.plan
    mask = mask.reshape(full)
    if layout.order is not None:
        mask = mask.transpose(layout.order)
    _, broadcast, work = plan.mask_shapes(mask.shape)
    at = slice(plan.channel, plan.channel + (1 if plan.two_stages else 2))
    if product(work[at]) != 1:
        return NotServed("the mask tells channels apart")
    kept = {axis - (axis > plan.channel) for axis in plan.kept}
    rest = [*work[: at.start], *work[at.stop :]]
    samples = rest[0] if kept else 1
    positions = rest[-1] if len(rest) > len(kept) else 1
    flat = np.broadcast_to(mask, broadcast).reshape(samples, positions)
    return np.ascontiguousarray(np.broadcast_to(flat, (samples, layout.positions)), np.uint8)


NO_MASK = np.empty((0, 0), np.uint8)
# As the kernels number them.
ACTIVATION_NUMBERS = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
_told: set[Any] = set()


def forward(
    layout: Layout, x: Any, y: Any, scale: Any, bias: Any, mask: Any,
    epsilon: float, activation: int, x_float16: bool, y_float16: bool,
) -> Saved:  # fmt: skip
    """Normalize flat x into flat y; half-precision arrays as uint16."""
    launch = _first_forward if layout.first else _last_forward
    return _timed(  # type: ignore[no-any-return]
        launch, layout, x, y, scale, bias, mask, epsilon, activation, x_float16, y_float16
    )


def backward(
    layout: Layout, saved: Saved, x: Any, dy: Any, dx: Any, scale: Any, bias: Any, mask: Any,
    activation: int, x_float16: bool, dy_float16: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """Pull flat dy back into flat dx; return the gradients of bias and scale, in float64."""
    launch = _first_backward if layout.first else _last_backward
    return _timed(  # type: ignore[no-any-return]
        launch, layout, saved, x, dy, dx, scale, bias, mask, activation, x_float16, dy_float16
    )


def _timed(launch: Any, *arguments: Any) -> Any:
    """Say so where a call had to compile."""
    key = (launch, *(a.dtype.char for a in arguments if isinstance(a, np.ndarray)))
    if key in _told:
        return launch(*arguments)
    start, misses = time.perf_counter(), _cache_misses()
    result = launch(*arguments)
    _told.add(key)
    if _cache_misses() > misses:
        _log.warning(
            "groupnorm compiled CPU kernels for this combination of dtypes in %.1f s; they are "
            "cached on disk, and later processes load them.",
            time.perf_counter() - start,
        )
    return result


def _cache_misses() -> int:
    module = kernels()
    return sum(
        sum(getattr(module, name).stats.cache_misses.values())
        for name in module.__all__
        if hasattr(getattr(module, name), "stats")
    )


def _width(layout: Layout, mask: Any) -> int:
    """Return the elements of a band; rows that may be masked out go one by one."""
    rows: int = 1 if mask.shape[0] else kernels().band_rows(layout.channels)
    return rows * layout.channels


def _group_numbers(layout: Layout) -> tuple[Any, Any, Any]:
    shape = layout.samples * layout.groups
    return np.empty(shape), np.empty(shape), np.empty(shape)


# Channels first -----------------------------------------------------------------------------------


def _first_forward(
    layout: Layout, x: Any, y: Any, scale: Any, bias: Any, mask: Any,
    epsilon: float, activation: int, x_float16: bool, y_float16: bool,
) -> Saved:  # fmt: skip
    module = kernels()
    numbers = _group_numbers(layout)

    def run(start: int, stop: int) -> None:
        buffer, y_buffer = np.empty((2, module.BLOCK), np.float32)
        module.first_forward(
            x, y, scale, bias, mask, layout.groups, layout.size, layout.positions, epsilon,
            x_float16, y_float16, activation, *numbers, buffer, y_buffer, start, stop,
        )  # fmt: skip

    over_threads(layout.samples * layout.groups, layout.elements, run)
    return Saved(*numbers, None, None, None)


def _first_backward(
    layout: Layout, saved: Saved, x: Any, dy: Any, dx: Any, scale: Any, bias: Any, mask: Any,
    activation: int, x_float16: bool, dy_float16: bool,
) -> tuple[Any, Any]:  # fmt: skip
    module = kernels()
    sum_dy, sum_dy_xhat = np.empty((2, layout.samples, layout.channels))

    def run(start: int, stop: int) -> None:
        buffers = np.empty((3, module.BLOCK), np.float32)
        module.first_backward(
            x, dy, dx, scale, bias, mask, layout.groups, layout.size, layout.positions,
            x_float16, dy_float16, activation, saved.mean, saved.rstd, saved.share,
            sum_dy.reshape(-1), sum_dy_xhat.reshape(-1), *buffers, start, stop,
        )  # fmt: skip

    over_threads(layout.samples * layout.groups, layout.elements, run)
    return sum_dy.sum(axis=0), sum_dy_xhat.sum(axis=0)


# Channels last ------------------------------------------------------------------------------------


def _last_forward(
    layout: Layout, x: Any, y: Any, scale: Any, bias: Any, mask: Any,
    epsilon: float, activation: int, x_float16: bool, y_float16: bool,
) -> Saved:  # fmt: skip
    module, dtype = kernels(), np.float32
    samples, channels, positions = layout.samples, layout.channels, layout.positions
    rows, width = module.chunk_rows(channels), _width(layout, mask)
    chunks = -(-positions // rows)
    counts = np.empty(samples * chunks)
    means, m2s = np.empty((2, samples * chunks, channels))
    numbers = _group_numbers(layout)
    applied = np.empty((3, samples, width), dtype)

    def measure(start: int, stop: int) -> None:
        buffer = np.empty(rows * channels, dtype)
        module.last_measure(
            x, mask, positions, channels, width, rows, chunks, x_float16, counts, means, m2s,
            buffer, start, stop,
        )  # fmt: skip

    def merge(start: int, stop: int) -> None:
        module.last_merge(
            x, mask, scale, bias, layout.groups, layout.size, positions, chunks, epsilon, x_float16,
            counts, means, m2s, *numbers, *applied, np.empty(channels, dtype), start, stop,
        )  # fmt: skip

    def apply(start: int, stop: int) -> None:
        buffer, y_buffer = np.empty((2, width), dtype)
        module.last_apply(
            x, y, mask, positions, channels, x_float16, y_float16, activation, *applied,
            buffer, y_buffer, start, stop,
        )  # fmt: skip

    _in_phases(layout, chunks, measure, merge, apply)
    return Saved(*numbers, *applied)


def _last_backward(
    layout: Layout, saved: Saved, x: Any, dy: Any, dx: Any, scale: Any, bias: Any, mask: Any,
    activation: int, x_float16: bool, dy_float16: bool,
) -> tuple[Any, Any]:  # fmt: skip
    module, dtype = kernels(), np.float32
    samples, channels, positions = layout.samples, layout.channels, layout.positions
    rows, width = module.chunk_rows(channels), saved.centre.shape[1]
    chunks = -(-positions // rows)
    sums, weighted_sums = np.empty((2, samples * chunks, channels))
    sum_dy, sum_dy_xhat = np.empty((2, samples, channels))
    rstds, shift, slope, offset = np.empty((4, samples, width), dtype)
    applied = (saved.centre, saved.factor, saved.term)

    def measure(start: int, stop: int) -> None:
        module.last_backward_sums(
            x, dy, mask, positions, channels, rows, chunks, x_float16, dy_float16, activation,
            *applied, sums, weighted_sums, *np.empty((2, width), dtype), start, stop,
        )  # fmt: skip

    def merge(start: int, stop: int) -> None:
        module.last_backward_merge(
            scale, layout.groups, layout.size, chunks, saved.mean, saved.rstd, saved.share,
            sums, weighted_sums, sum_dy, sum_dy_xhat, rstds, shift, slope, offset, start, stop,
        )  # fmt: skip

    def apply(start: int, stop: int) -> None:
        module.last_backward_apply(
            x, dy, dx, mask, positions, channels, x_float16, dy_float16, activation, *applied,
            rstds, shift, slope, offset, *np.empty((3, width), dtype), start, stop,
        )  # fmt: skip

    _in_phases(layout, chunks, measure, merge, apply)
    return sum_dy.sum(axis=0), sum_dy_xhat.sum(axis=0)


def _in_phases(layout: Layout, chunks: int, measure: Run, merge: Run, apply: Run) -> None:
    """Sample by sample where the cache holds one, else all samples phase by phase.

    The numbers are the same: chunks are merged in the same order.
    """
    samples, positions, elements = layout.samples, layout.positions, layout.elements

    def whole(start: int, stop: int) -> None:
        for sample in range(start, stop):
            measure(sample * chunks, (sample + 1) * chunks)
            merge(sample, sample + 1)
            apply(sample * positions, (sample + 1) * positions)

    # One sample alone keeps one thread busy, unless it is small.
    if elements <= CACHED * samples and (samples > 1 or elements < SMALL):
        over_threads(samples, elements, whole)
        return
    over_threads(samples * chunks, elements, measure)
    over_threads(samples, samples * chunks * layout.channels, merge)
    over_threads(samples * positions, elements, apply)
