"""The launches of GPU kernels that compute a call, planned once per shape.

Small groups are read once, into registers, by one kernel. Larger groups are read twice. Where
channels come first, a group is contiguous, and one program reads it twice, the second time from the
cache, if there are many such groups, or they are short. All others are measured in slabs, merged,
and read again.

The division depends on the shape alone, and there are no atomics: the same call gives the same
bits. Each library runs the launches: PyTorch and CuPy by the driver's functions, JAX as PTX.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from groupnorm.backends.kernels.gpu.tiling import (
    SAMPLED,
    SMALL,
    SMALL_FIRST,
    UNROLL,
    Slabs,
    Tiles,
    power_of_two,
    slabs_of,
    slabs_of_whole_groups,
    tiles_of_small_groups,
    warps_for,
)
from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.kernels.variants import ACTIVATIONS

__all__ = ["KernelOptions", "Launch", "LaunchSequence", "backward", "forward", "statistics_shape"]

MASKS = {None: 0, "one": 1, "each": 2}
# About how many elements a program measures, and applies: fewer, as it has nothing to add up. If
# that makes fewer than FEWEST programs, two for each multiprocessor of a large GPU, they get less.
MEASURED, APPLIED, FEWEST = 32768, 8192, 264
# Tiles of a round, of which several are under way: but for float32, where more are slower, and for
# statistics, which take `UNROLL` tiles at once. As measured on an H200.
OVERLAPPED, STAGES = 2, 3
MERGED_AT_ONCE = 1024
# Below this, squares that underflow count.
TINY_EPSILON = 1e-30
ROWS_AT_ONCE, CHANNELS_AT_ONCE = 32, 32
MANY_ROWS, ROWS_OF_A_BLOCK = 512, 128
SUMS = ("products", "gradients")


class KernelOptions(NamedTuple):
    """Kernel options that are independent of the shape."""

    epsilon: float
    activation: str | None
    mask: str | None  # "one" for all samples, "each" for one per sample, or None
    scale: bool
    bias: bool
    rows: bool = False  # whether scale and bias have a row for each sample


class Launch(NamedTuple):
    """One launch of a kernel."""

    module: str  # of `kernels.gpu.compiled`
    kernel: str
    grid: tuple[int, ...]
    arrays: tuple[str, ...]  # in the order of the kernel's pointers
    written: int  # how many of them, the last ones, are written
    scalars: tuple[tuple[str, int], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int


class LaunchSequence(NamedTuple):
    """Launches, and the names and float32 sizes of the temporary arrays that they share."""

    launches: tuple[Launch, ...]
    shared: tuple[tuple[str, int], ...]


def statistics_shape(shape: GroupedShape) -> tuple[int, int, int]:
    """Return the shape of the statistics, in float32."""
    return 2, shape.samples * shape.groups, 2


@lru_cache(maxsize=4096)
def forward(shape: GroupedShape, options: KernelOptions) -> LaunchSequence:
    """Return the launches that compute y and the statistics."""
    arrays = ("x", "scale", "bias", "mask")
    groups, size = _groups(shape), _size(shape)
    epsilon, unit = ("EPSILON", options.epsilon), ("LARGEST_UNIT", _largest_unit(options.epsilon))
    tiny = ("TINY", int(options.epsilon < TINY_EPSILON))
    mask, *parameters = _flags(options)
    tiles = tiles_of_small_groups(shape, _limit(shape, options, 1))
    if tiles is not None:
        constants = (epsilon, unit, *size, *_tile(shape, tiles), mask, *parameters)
        return _alone(
            "small", "normalize", shape.samples * tiles.blocks(shape), (*arrays, "y", "statistics"),
            2, (_steps(shape), groups), constants, warps_for(tiles.elements()),
        )  # fmt: skip
    whole = slabs_of_whole_groups(shape, 1, UNROLL)
    if whole is not None:
        sample = whole.sample(shape.group_size // whole.width)
        constants = (
            epsilon, unit, tiny, *size, *_walk(shape, whole), ("SAMPLE", sample), mask,
            *parameters,
        )  # fmt: skip
        return _alone(
            "forward", "group", groups[1], (*arrays, "y", "statistics"), 2,
            (_steps(shape), groups), constants, whole.warps,
        )  # fmt: skip
    measured = slabs_of(shape, _programs(shape, MEASURED), UNROLL, SAMPLED)
    applied = slabs_of(shape, _programs(shape, APPLIED), OVERLAPPED)
    chunks = measured.chunks(shape)
    launches = (
        _by_slabs(
            "forward", "measure", shape, measured, ("x", "mask", "parts"), 1, (),
            (
                unit, tiny, size[0], *_walk(shape, measured), ("SAMPLE", measured.sample()),
                *_order(shape, measured), mask,
            ),
        ),
        _merge("forward", shape, chunks, ("parts", "statistics"), (epsilon, unit)),
        _by_slabs(
            "forward", "apply", shape, applied, (*arrays, "statistics", "y"), 1, (groups,),
            (*size, *_tiled(shape, applied), *_order(shape, applied), mask, *parameters),
        ),
    )  # fmt: skip
    return LaunchSequence(launches, (("parts", shape.samples * chunks * 5 * shape.channels),))


@lru_cache(maxsize=4096)
def backward(shape: GroupedShape, options: KernelOptions, batches: int = 1) -> LaunchSequence:
    """Return the launches that compute dx, and dscale and dbias, (batches, channels).

    The samples are divided into `batches`, with separate dscale and dbias.
    """
    arrays = ("dy", "x", "scale", "bias", "mask", "statistics")
    groups, size, flags = _groups(shape), _size(shape), _flags(options)
    shared: dict[str, int] = {}
    tiles = tiles_of_small_groups(shape, _limit(shape, options, 2))
    whole = slabs_of_whole_groups(shape, 2, OVERLAPPED)
    if whole is not None and _stages(shape, whole) == 1:
        whole = slabs_of_whole_groups(shape, 2, UNROLL)
    rows = shape.samples
    if tiles is not None:
        launches = _alone(
            "small", "pull_back", shape.samples * tiles.blocks(shape), (*arrays, "dx", *SUMS), 3,
            (_steps(shape), groups), (*size, *_tile(shape, tiles), *flags),
            warps_for(2 * tiles.elements()),  # a thread holds two arrays
        ).launches  # fmt: skip
    elif whole is not None:
        launches = _alone(
            "backward", "group", groups[1], (*arrays, "dx", *SUMS), 3, (_steps(shape), groups),
            (*size, *_walk(shape, whole), ("STAGES", _stages(shape, whole)), *flags), whole.warps,
        ).launches  # fmt: skip
    else:
        measured = slabs_of(shape, _programs(shape, MEASURED), OVERLAPPED)
        applied = slabs_of(shape, _programs(shape, APPLIED), OVERLAPPED)
        shared["merged"] = shape.samples * shape.groups * 2
        chunks = measured.chunks(shape)
        rows *= chunks
        _, scale, _, by_row, _ = flags
        launches = (
            _by_slabs(
                "backward", "measure", shape, measured, (*arrays, *SUMS), 2, (groups,),
                (
                    *size, *_walk(shape, measured), ("STAGES", _stages(shape, measured)),
                    *_order(shape, measured), *flags,
                ),
            ),
            _merge(
                "backward", shape, chunks, ("scale", *SUMS, "statistics", "merged"),
                (scale, by_row),
            ),
            _by_slabs(
                "backward", "apply", shape, applied, (*arrays, "merged", "dx"), 1, (groups,),
                (*size, *_tiled(shape, applied), *_order(shape, applied), *flags),
            ),
        )  # fmt: skip
    shared |= dict.fromkeys(SUMS, rows * shape.channels)
    sums = tuple(_sum_rows(shape.channels, rows, batches, shared))
    return LaunchSequence((*launches, *sums), tuple(shared.items()))


def _programs(shape: GroupedShape, elements: int) -> int:
    return max(shape.elements // elements, FEWEST)


def _limit(shape: GroupedShape, options: KernelOptions, arrays: int) -> int:
    """Return the most elements of a small group, of which `arrays` are in registers."""
    if shape.channels_first:
        return SMALL_FIRST
    halvings = (options.mask is not None) + (options.activation == "gelu")
    return (SMALL // arrays) >> halvings


def _alone(
    module: str, kernel: str, programs: int, arrays: Any, written: int, scalars: Any,
    constants: Any, warps: int,
) -> LaunchSequence:  # fmt: skip
    only = Launch(module, kernel, (programs,), arrays, written, scalars, constants, warps)
    return LaunchSequence((only,), ())


def _by_slabs(
    module: str, kernel: str, shape: GroupedShape, slabs: Slabs, arrays: Any, written: int,
    scalars: Any, constants: Any,
) -> Launch:  # fmt: skip
    chunks = slabs.chunks(shape)
    return Launch(
        module, kernel, (shape.samples * slabs.blocks(shape) * chunks,), arrays, written,
        (_steps(shape), ("chunk", slabs.chunk), ("chunks", chunks), *scalars), constants,
        slabs.warps,
    )  # fmt: skip


def _merge(
    module: str, shape: GroupedShape, chunks: int, arrays: Any, constants: Any
) -> Launch:  # fmt: skip
    at_once = min(power_of_two(chunks * shape.group_size), MERGED_AT_ONCE)
    groups = _groups(shape)
    return Launch(
        module, "merge", (groups[1],), arrays, 1, (("chunks", chunks), groups),
        (*constants, *_size(shape), ("AT_ONCE", at_once)), warps_for(8 * at_once),
    )  # fmt: skip


def _sum_rows(channels: int, rows: int, batches: int, shared: dict[str, int]) -> Iterator[Launch]:
    sums = SUMS
    while rows > MANY_ROWS and batches == 1:
        blocks = -(-rows // ROWS_OF_A_BLOCK)
        fewer = (f"{blocks} {SUMS[0]}", f"{blocks} {SUMS[1]}")
        shared |= dict.fromkeys(fewer, blocks * channels)
        yield _rows_launch(channels, rows, ROWS_OF_A_BLOCK, (*sums, *fewer))
        rows, sums = blocks, fewer
    yield _rows_launch(channels, rows, rows // batches, (*sums, "dscale", "dbias"))


def _rows_launch(channels: int, rows: int, block: int, arrays: tuple[str, ...]) -> Launch:
    programs = -(-channels // CHANNELS_AT_ONCE) * -(-rows // block)
    return Launch(
        "backward", "sum_rows", (programs,), arrays, 2,
        (("rows", rows), ("ROWS_PER_BLOCK", block)),
        (("CHANNELS", channels), ("ROWS_P2", ROWS_AT_ONCE), ("BLOCK_CHANNELS", CHANNELS_AT_ONCE)),
        4,
    )  # fmt: skip


# Arguments ----------------------------------------------------------------------------------------


def _divisor(shape: GroupedShape) -> int:
    return min(shape.positions & -shape.positions, 16)


def _steps(shape: GroupedShape) -> tuple[str, int]:
    return "steps", shape.positions // _divisor(shape)


def _groups(shape: GroupedShape) -> tuple[str, int]:
    return "groups", shape.samples * shape.groups


def _size(shape: GroupedShape) -> tuple[tuple[str, int], ...]:
    return ("CHANNELS", shape.channels), ("GROUP_SIZE", shape.group_size)


def _tile(shape: GroupedShape, tiles: Tiles) -> tuple[tuple[str, int], ...]:
    return (
        ("TILE_CHANNELS", tiles.width), ("TILE_CHANNELS_P2", power_of_two(tiles.width)),
        ("TILE_POSITIONS", tiles.length), ("DIVISOR", _divisor(shape)),
        ("BLOCKS", tiles.blocks(shape)), ("GROUPS_P2", power_of_two(tiles.groups(shape))),
        ("CHANNELS_FIRST", int(shape.channels_first)), ("FULL", int(tiles.full(shape))),
    )  # fmt: skip


def _walk(shape: GroupedShape, slabs: Slabs) -> tuple[tuple[str, int], ...]:
    """Return the constants of a walk over slabs, with several tiles in a round."""
    return (
        ("TILE_CHANNELS", slabs.width), ("TILE_POSITIONS", slabs.length), ("UNROLL", slabs.unroll),
        ("DIVISOR", _divisor(shape)), ("EVEN", int(slabs.even(shape))),
    )  # fmt: skip


def _tiled(shape: GroupedShape, slabs: Slabs) -> tuple[tuple[str, int], ...]:
    """Return the constants of a walk over slabs, with one tile in a round."""
    return (
        ("TILE_CHANNELS", slabs.width), ("TILE_POSITIONS", slabs.at_once),
        ("DIVISOR", _divisor(shape)), ("EVEN", int(slabs.even(shape))),
        ("STAGES", _stages(shape, slabs)),
    )  # fmt: skip


def _stages(shape: GroupedShape, slabs: Slabs) -> int:
    """Return how many rounds are under way: one if there are few, or they are of float32."""
    many = slabs.chunk > STAGES * slabs.at_once
    return STAGES if shape.item_bytes == 2 and many else 1


def _order(shape: GroupedShape, slabs: Slabs) -> tuple[tuple[str, int], ...]:
    return ("BLOCKS", slabs.blocks(shape)), ("CHANNELS_FIRST", int(shape.channels_first))


def _flags(options: KernelOptions) -> tuple[tuple[str, int], ...]:
    return (
        ("MASK", MASKS[options.mask]), ("SCALE", int(options.scale)), ("BIAS", int(options.bias)),
        ("ROWS", int(options.rows)), ("ACTIVATION", ACTIVATIONS[options.activation]),
    )  # fmt: skip


def _largest_unit(epsilon: float) -> float:
    """Return the largest power of two that deviations may be multiplied by.

    With it, epsilon * unit**2 does not overflow. Smaller deviations are negligible next to epsilon.
    """
    exponent = 100.0 if epsilon == 0 else min(50.0 - 0.5 * math.log2(epsilon), 100.0)
    return 2.0 ** math.floor(exponent)
