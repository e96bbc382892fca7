"""What the kernels for GPUs are called with: a list of steps for a shape, made once.

Plan A: groups that fit the registers are read once, by one kernel. Plan B: the rest is measured by
tiles, merged, and read again. Plan C: large arrays take plan B by waves that stay in the cache.
Which it is depends on the shape alone, and there are no atomics: the same call gives the same bits.

Launchers run the steps: by Triton itself for PyTorch, as cubins for CuPy, as PTX for JAX.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from groupnorm.backends.gpu_tiles import (
    CHUNK_BACKWARD,
    CHUNK_FORWARD,
    WHOLE_BACKWARD,
    WHOLE_FORWARD,
    Form,
    Tiles,
    chunked,
    power_of_two,
    warps_for,
    whole,
)

__all__ = ["ACTIVATIONS", "Asked", "Program", "Step", "backward", "forward", "statistics_shape"]

ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
MASKS = {None: 0, "one": 1, "each": 2}
# Parts of a group that a tile merges itself; more are merged by a kernel of their own.
FEW_PARTS = 128
MERGED_AT_ONCE = 1024
# Arrays above `LARGE` bytes are computed in waves of at most `WAVE`, which the second-level cache
# holds: 40 MB and more on the GPUs this is for.
LARGE, WAVE = 30_000_000, 24_000_000
ROWS_AT_ONCE, CHANNELS_AT_ONCE = 32, 32
MANY_ROWS, ROWS_OF_A_BLOCK = 512, 128


class Asked(NamedTuple):
    """What is computed, beside the shape."""

    epsilon: float
    activation: str | None
    mask: str | None  # "one" for all samples, one for "each", or None
    scale: bool
    bias: bool
    waves: bool = True  # not where a result is written by one step alone


class Step(NamedTuple):
    """One launch of a kernel."""

    module: str  # of `backends.kernels`
    kernel: str
    grid: tuple[int, ...]
    arrays: tuple[str, ...]  # in the order of the kernel's pointers; None stands for one not there
    scalars: tuple[tuple[str, int], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int


class Program(NamedTuple):
    """Steps, and how many elements of float32 each array takes that they share."""

    steps: tuple[Step, ...]
    shared: tuple[tuple[str, int], ...]


def statistics_shape(form: Form) -> tuple[int, int, int]:
    """Return the shape of the statistics, in float32."""
    return 2, form.samples * form.groups, 2


@lru_cache(maxsize=4096)
def forward(form: Form, asked: Asked) -> Program | None:
    """Return what computes y and the statistics; None where no tiles fit."""
    tiles = whole(form, WHOLE_FORWARD)
    common = (*_flags(asked), ("ACTIVATION", ACTIVATIONS[asked.activation]))
    exact = (("EPSILON", asked.epsilon), ("LARGEST_UNIT", _largest_unit(asked.epsilon)))
    arrays = ("x", "scale", "bias", "mask")
    if tiles is not None:
        step = _step(
            "triton_forward", "whole", form, tiles, _all(form, tiles),
            (*arrays, "y", "statistics"), ("groups",), (*exact, *common),
        )  # fmt: skip
        return Program((step,), ())
    tiles = chunked(form, CHUNK_FORWARD)
    if tiles is None:
        return None
    count = tiles.parts * tiles.chunks(form)
    few = count <= FEW_PARTS
    steps = []
    for wave in _waves(form, tiles, form.item, asked.waves):
        mask = (("MASK", MASKS[asked.mask]),)
        steps.append(
            _step(
                "triton_forward", "measure", form, tiles, wave, ("x", "mask", "parts"), (),
                (exact[1], *mask),
            )  # fmt: skip
        )
        if not few:
            steps.append(_merge("triton_forward", wave, count, form, "statistics", exact[:1]))
        merged = ("KP", power_of_two(count) if few else 0)
        steps.append(
            _step(
                "triton_forward", "apply", form, tiles, wave,
                (*arrays, "parts", "y", "statistics"), ("groups",), (exact[0], merged, *common),
            )  # fmt: skip
        )
    return Program(tuple(steps), (("parts", form.samples * form.groups * count * 5),))


@lru_cache(maxsize=4096)
def backward(form: Form, asked: Asked) -> Program | None:
    """Return what computes dx, dscale and dbias; None where no tiles fit."""
    arrays = ("dy", "x", "scale", "bias", "mask", "statistics")
    common = (*_flags(asked), ("ACTIVATION", ACTIVATIONS[asked.activation]))
    tiles = whole(form, WHOLE_BACKWARD)
    shared = {}
    steps = []
    if tiles is not None:
        steps.append(
            _step(
                "triton_backward", "whole", form, tiles, _all(form, tiles),
                (*arrays, "dx", "sums"), ("groups",), common,
            )  # fmt: skip
        )
    else:
        tiles = chunked(form, CHUNK_BACKWARD)
        if tiles is None:
            return None
        count = tiles.parts * tiles.chunks(form)
        few = count <= FEW_PARTS
        shared["parts"] = form.samples * form.groups * count * 2
        if not few:
            shared["merged"] = form.samples * form.groups * 2
        for wave in _waves(form, tiles, 2 * form.item, asked.waves):
            steps.append(
                _step(
                    "triton_backward", "measure", form, tiles, wave, (*arrays, "parts", "sums"),
                    ("groups",), common,
                )  # fmt: skip
            )
            if not few:
                steps.append(_merge("triton_backward", wave, count, form, "merged", ()))
            merged = ("KP", power_of_two(count) if few else 1)
            parts = "parts" if few else "merged"
            steps.append(
                _step(
                    "triton_backward", "apply", form, tiles, wave, (*arrays, parts, "dx"),
                    ("groups", ("tiles", count if few else 1)), (merged, *common),
                )  # fmt: skip
            )
    rows = form.samples * tiles.chunks(form)
    shared["sums"] = 2 * rows * form.channels
    steps += _sum_rows(form.channels, rows, shared)
    return Program(tuple(steps), tuple(shared.items()))


class _Wave(NamedTuple):
    """Tiles that are computed together, and the groups they are of."""

    begin: int
    count: int
    first_group: int
    groups: int


def _all(form: Form, tiles: Tiles) -> _Wave:
    count = form.samples * tiles.blocks(form) * tiles.chunks(form)
    return _Wave(0, count, 0, form.samples * form.groups)


def _waves(form: Form, tiles: Tiles, item: int, wanted: bool) -> Iterator[_Wave]:
    """Split by groups, or by samples where the channels of all groups lie together."""
    everything = _all(form, tiles)
    total = form.samples * form.channels * form.positions * item
    apart = form.first and tiles.groups(form) == 1
    units = form.samples * form.groups if apart else form.samples
    if not wanted or total <= LARGE or total > units * WAVE:
        yield everything
        return
    many = min(WAVE * units // total, units)  # units of a wave
    tiles_of_a_unit, groups_of_a_unit = everything.count // units, everything.groups // units
    for begin in range(0, units, many):
        count = min(many, units - begin)
        yield _Wave(
            begin * tiles_of_a_unit, count * tiles_of_a_unit, begin * groups_of_a_unit,
            count * groups_of_a_unit,
        )  # fmt: skip


def _step(
    module: str, kernel: str, form: Form, tiles: Tiles, wave: _Wave, arrays: Any, scalars: Any,
    constants: Any,
) -> Step:  # fmt: skip
    divisor = min(form.positions & -form.positions, 16)
    known = {"groups": form.samples * form.groups}
    numbers = [("steps", form.positions // divisor)]
    numbers += [(s, known[s]) if isinstance(s, str) else s for s in scalars]
    padded = power_of_two(tiles.width)
    return Step(
        module, kernel, (wave.count,), arrays, (*numbers, ("begin_at", wave.begin)),
        (
            *constants, ("C", form.channels), ("D", form.size), ("W", tiles.width),
            ("WP", padded), ("BP", tiles.length), ("V", divisor), ("J", tiles.parts),
            ("NB", tiles.blocks(form)), ("GBP", power_of_two(tiles.groups(form))),
            ("FIRST", int(form.first)), ("FULL", int(tiles.full(form))),
        ),
        warps_for(tiles.elements()),
    )  # fmt: skip


def _merge(
    module: str, wave: _Wave, count: int, form: Form, result: str, constants: Any
) -> Step:  # fmt: skip
    at_once = min(power_of_two(count), MERGED_AT_ONCE)
    scalars: tuple[tuple[str, int], ...] = (("tiles", count), ("begin_at", wave.first_group))
    if constants:
        scalars = (*scalars, ("groups", form.samples * form.groups))
    return Step(
        module, "merge", (wave.groups,), ("parts", result), scalars,
        (*constants, ("KP", at_once)), warps_for(8 * at_once),
    )  # fmt: skip


def _sum_rows(channels: int, rows: int, shared: dict[str, int]) -> Iterator[Step]:
    sums = "sums"
    if rows > MANY_ROWS:
        blocks = -(-rows // ROWS_OF_A_BLOCK)
        # One array: that of scale before that of bias, as the next step reads them.
        shared["fewer_sums"] = 2 * blocks * channels
        yield _rows_step(channels, rows, ROWS_OF_A_BLOCK, sums, ("fewer_sums", "fewer_sums"), True)
        rows, sums = blocks, "fewer_sums"
    yield _rows_step(channels, rows, rows, sums, ("dscale", "dbias"), False)


def _rows_step(
    channels: int, rows: int, block: int, sums: str, results: tuple[str, str], together: bool
) -> Step:
    grid = (-(-channels // CHANNELS_AT_ONCE), -(-rows // block))
    return Step(
        "triton_backward", "sum_rows", grid, (sums, *results),
        (("rows", rows), ("R", block), ("behind", grid[1] * channels if together else 0)),
        (("C", channels), ("RP", ROWS_AT_ONCE), ("BC", CHANNELS_AT_ONCE)), 4,
    )  # fmt: skip


def _flags(asked: Asked) -> tuple[tuple[str, int], ...]:
    return (
        ("MASK", MASKS[asked.mask]), ("SCALE", int(asked.scale)), ("BIAS", int(asked.bias)),
    )  # fmt: skip


def _largest_unit(epsilon: float) -> float:
    """Return the largest power of two that deviations may be multiplied by.

    Then epsilon in the unit squared does not overflow. Data below that scale is nothing beside it.
    """
    exponent = 100.0 if epsilon == 0 else min(50.0 - 0.5 * math.log2(epsilon), 100.0)
    return 2.0 ** math.floor(exponent)
