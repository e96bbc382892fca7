"""What the kernels for GPUs are called with: a list of steps for a shape, made once.

Plan A: groups that fit the registers are read once, by one kernel. Plan B: the rest is measured by
tiles, merged, and read again. Plan C: large arrays take plan B by waves that stay in the cache, in
a CUDA graph, since outside of one it takes longer to launch a wave than to compute it.
How groups are cut depends on the shape alone, and there are no atomics: the same call gives the
same bits.

Launchers run the steps: by Triton itself for PyTorch, as cubins for CuPy, as PTX for JAX.
"""

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

from groupnorm.backends.kernels.gpu.tiling import (
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
from groupnorm.backends.kernels.variants import ACTIVATIONS

__all__ = ["Asked", "Program", "Step", "backward", "forward", "statistics_shape"]

MASKS = {None: 0, "one": 1, "each": 2}
# Parts of a group that a tile merges itself; more are merged by a kernel of their own.
FEW_PARTS = 128
MERGED_AT_ONCE = 1024
# Arrays above `LARGE` bytes are computed in waves of at most `WAVE`, which the second-level cache
# holds: 40 MB and more on the GPUs this is for.
LARGE, WAVE = 30_000_000, 24_000_000
ROWS_AT_ONCE, CHANNELS_AT_ONCE = 32, 32
MANY_ROWS, ROWS_OF_A_BLOCK = 512, 128
SUMS = ("products", "gradients")


class Asked(NamedTuple):
    """What is computed, beside the shape."""

    epsilon: float
    activation: str | None
    mask: str | None  # "one" for all samples, one for "each", or None
    scale: bool
    bias: bool
    waves: bool = False  # where launches cost next to nothing; they do not change what is computed


class Step(NamedTuple):
    """One launch of a kernel."""

    module: str  # of `backends.kernels`
    kernel: str
    grid: tuple[int, ...]
    arrays: tuple[str, ...]  # in the order of the kernel's pointers; "" for one that is not used
    written: int  # how many of them, from the last on
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
def forward(form: Form, asked: Asked) -> Program:
    """Return what computes y and the statistics."""
    arrays = ("x", "scale", "bias", "mask")
    epsilon, unit = ("EPSILON", asked.epsilon), ("LARGEST_UNIT", _largest_unit(asked.epsilon))
    mask, *rest = _flags(asked)
    tiles = whole(form, _limit(WHOLE_FORWARD, form, asked))
    if tiles is not None:
        step = partial(_step, "forward", form, tiles, _all(form, tiles))
        constants = (epsilon, unit, mask, *rest)
        only = step("whole", (*arrays, "y", "statistics"), 2, (_groups(form),), constants)
        return Program((only,), ())
    tiles = chunked(form, CHUNK_FORWARD)
    count = tiles.parts * tiles.chunks(form)
    few = count <= FEW_PARTS
    merged = ("KP", power_of_two(count) if few else 0)
    used = (*arrays, "parts", "y", "statistics") if few else (*arrays, "statistics", "y", "")
    steps = []
    for wave in _waves(form, tiles, form.item, asked.waves):
        step = partial(_step, "forward", form, tiles, wave)
        steps.append(step("measure", ("x", "mask", "parts"), 1, (), (unit, mask)))
        if not few:
            steps.append(_merge("forward", wave, count, form, "statistics", (epsilon,)))
        steps.append(step("apply", used, 2, (_groups(form),), (epsilon, merged, mask, *rest)))
    return Program(tuple(steps), (("parts", form.samples * form.groups * count * 5),))


@lru_cache(maxsize=4096)
def backward(form: Form, asked: Asked, batches: int = 1) -> Program:
    """Return what computes dx, and dscale and dbias, (batches, channels).

    The latter are apart for so many parts of the samples.
    """
    arrays = ("dy", "x", "scale", "bias", "mask", "statistics")
    flags = _flags(asked)
    shared: dict[str, int] = {}
    tiles = whole(form, _limit(WHOLE_BACKWARD, form, asked))
    if tiles is not None:
        step = partial(_step, "backward", form, tiles, _all(form, tiles))
        steps = [step("whole", (*arrays, "dx", *SUMS), 3, (_groups(form),), flags)]
    else:
        tiles = chunked(form, CHUNK_BACKWARD)
        count = tiles.parts * tiles.chunks(form)
        few = count <= FEW_PARTS
        shared["parts"] = form.samples * form.groups * count * 2
        if not few:
            shared["merged"] = form.samples * form.groups * 2
        merged = ("KP", power_of_two(count) if few else 1)
        used = (*arrays, "parts" if few else "merged", "dx")
        scalars = (_groups(form), ("tiles", count if few else 1))
        steps = []
        for wave in _waves(form, tiles, 2 * form.item, asked.waves):
            step = partial(_step, "backward", form, tiles, wave)
            steps.append(step("measure", (*arrays, "parts", *SUMS), 3, (_groups(form),), flags))
            if not few:
                steps.append(_merge("backward", wave, count, form, "merged", ()))
            steps.append(step("apply", used, 1, scalars, (merged, *flags)))
    rows = form.samples * tiles.chunks(form)
    shared |= dict.fromkeys(SUMS, rows * form.channels)
    steps += _sum_rows(form.channels, rows, batches, shared)
    return Program(tuple(steps), tuple(shared.items()))


def _limit(limits: tuple[int, int], form: Form, asked: Asked) -> int:
    """Return the most elements of a group that one tile keeps in the registers."""
    halvings = (asked.mask is not None) + (asked.activation == "gelu")
    return limits[0 if form.item == 2 else 1] >> halvings


class _Wave(NamedTuple):
    """Tiles that are computed together, and the groups they are of."""

    begin: int
    tiles: int
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
    waves = -(-units // (WAVE * units // total))
    many = -(-units // waves)  # units of a wave
    tiles_of_a_unit, groups_of_a_unit = everything.tiles // units, everything.groups // units
    for begin in range(0, units, many):
        count = min(many, units - begin)
        yield _Wave(
            begin * tiles_of_a_unit, count * tiles_of_a_unit, begin * groups_of_a_unit,
            count * groups_of_a_unit,
        )  # fmt: skip


def _step(
    module: str, form: Form, tiles: Tiles, wave: _Wave, kernel: str, arrays: Any, written: int,
    scalars: Any, constants: Any,
) -> Step:  # fmt: skip
    divisor = min(form.positions & -form.positions, 16)
    padded = power_of_two(tiles.width)
    return Step(
        module, kernel, (wave.tiles,), arrays, written,
        (("steps", form.positions // divisor), *scalars, ("begin_at", wave.begin)),
        (
            *constants, ("C", form.channels), ("D", form.size), ("W", tiles.width),
            ("WP", padded), ("BP", tiles.length), ("V", divisor), ("J", tiles.parts),
            ("NB", tiles.blocks(form)), ("GBP", power_of_two(tiles.groups(form))),
            ("FIRST", int(form.first)), ("FULL", int(tiles.full(form))),
        ),
        # Backward a thread holds two arrays.
        warps_for(tiles.elements() * (2 if "dy" in arrays else 1)),
    )  # fmt: skip


def _merge(
    module: str, wave: _Wave, count: int, form: Form, result: str, constants: Any
) -> Step:  # fmt: skip
    at_once = min(power_of_two(count), MERGED_AT_ONCE)
    scalars: tuple[tuple[str, int], ...] = (("tiles", count), ("begin_at", wave.first_group))
    if constants:
        scalars = (*scalars, _groups(form))
    return Step(
        module, "merge", (wave.groups,), ("parts", result), 1, scalars,
        (*constants, ("KP", at_once)), warps_for(8 * at_once),
    )  # fmt: skip


def _sum_rows(channels: int, rows: int, batches: int, shared: dict[str, int]) -> Iterator[Step]:
    sums = SUMS
    while rows > MANY_ROWS and batches == 1:
        blocks = -(-rows // ROWS_OF_A_BLOCK)
        fewer = (f"{blocks} {SUMS[0]}", f"{blocks} {SUMS[1]}")
        shared |= dict.fromkeys(fewer, blocks * channels)
        yield _rows_step(channels, rows, ROWS_OF_A_BLOCK, (*sums, *fewer))
        rows, sums = blocks, fewer
    yield _rows_step(channels, rows, rows // batches, (*sums, "dscale", "dbias"))


def _rows_step(channels: int, rows: int, block: int, arrays: tuple[str, ...]) -> Step:
    programs = -(-channels // CHANNELS_AT_ONCE) * -(-rows // block)
    return Step(
        "backward", "sum_rows", (programs,), arrays, 2, (("rows", rows), ("R", block)),
        (("C", channels), ("RP", ROWS_AT_ONCE), ("BC", CHANNELS_AT_ONCE)), 4,
    )  # fmt: skip


def _groups(form: Form) -> tuple[str, int]:
    return "groups", form.samples * form.groups


def _flags(asked: Asked) -> tuple[tuple[str, int], ...]:
    return (
        ("MASK", MASKS[asked.mask]), ("SCALE", int(asked.scale)), ("BIAS", int(asked.bias)),
        ("ACTIVATION", ACTIVATIONS[asked.activation]),
    )  # fmt: skip


def _largest_unit(epsilon: float) -> float:
    """Return the largest power of two that deviations may be multiplied by.

    Then epsilon in the unit squared does not overflow. Data below that scale is nothing beside it.
    """
    exponent = 100.0 if epsilon == 0 else min(50.0 - 0.5 * math.log2(epsilon), 100.0)
    return 2.0 ** math.floor(exponent)
