"""The launches of GPU kernels that compute a call, planned once per shape.

Plan A: groups that fit the registers are read once, by one kernel. Plan B: larger groups are
measured by tiles, merged, and read again. Plan C: large arrays take plan B in waves that stay in
the cache; only in a CUDA graph, since outside of one launching a wave takes longer than computing
it. The division of groups depends on the shape alone, and there are no atomics: the same call gives
the same bits.

Each library runs the launches: PyTorch by Triton's launcher, CuPy as cubins, JAX as PTX.
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
    Tiles,
    power_of_two,
    tile_parts,
    tile_whole_groups,
    warps_for,
)
from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.kernels.variants import ACTIVATIONS

__all__ = ["KernelOptions", "Launch", "LaunchSequence", "backward", "forward", "statistics_shape"]

MASKS = {None: 0, "one": 1, "each": 2}
# The most parts of a group that every tile merges itself; more are merged by a separate kernel.
FEW_PARTS = 128
MERGED_AT_ONCE = 1024
# Arrays above `LARGE` bytes are computed in waves of at most `WAVE` bytes, which fit the L2 cache:
# 40 MB and more on the GPUs that are supported.
LARGE, WAVE = 30_000_000, 24_000_000
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
    waves: bool = False  # if launches are cheap; results do not depend on it


class Launch(NamedTuple):
    """One launch of a kernel."""

    module: str  # of `kernels.gpu.compiled`
    kernel: str
    grid: tuple[int, ...]
    arrays: tuple[str, ...]  # in the order of the kernel's pointers; "" if unused
    written: int  # how many of them, the last ones, are written
    scalars: tuple[tuple[str, int], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    # Whether it may begin before the launch before it ends, and waits for it by itself.
    dependent: bool = False


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
    epsilon, unit = ("EPSILON", options.epsilon), ("LARGEST_UNIT", _largest_unit(options.epsilon))
    mask, *rest = _flags(options)
    tiles = tile_whole_groups(shape, _limit(WHOLE_FORWARD, shape, options))
    if tiles is not None:
        launch = partial(_launch, "forward", shape, tiles, _all(shape, tiles))
        constants = (epsilon, unit, mask, *rest)
        only = launch("whole", (*arrays, "y", "statistics"), 2, (_groups(shape),), constants)
        return LaunchSequence((only,), ())
    tiles = tile_parts(shape, CHUNK_FORWARD)
    count = tiles.parts * tiles.chunks(shape)
    few = count <= FEW_PARTS
    merged = ("MERGE_P2", power_of_two(count) if few else 0)
    used = (*arrays, "parts", "y", "statistics") if few else (*arrays, "statistics", "y", "")
    launches = []
    for wave in _waves(shape, tiles, shape.item_bytes, options.waves):
        launch = partial(_launch, "forward", shape, tiles, wave)
        launches.append(launch("measure", ("x", "mask", "parts"), 1, (), (unit, mask)))
        if not few:
            launches.append(_merge("forward", wave, count, shape, "statistics", (epsilon,)))
        launches.append(launch("apply", used, 2, (_groups(shape),), (epsilon, merged, mask, *rest)))
    return LaunchSequence(tuple(launches), (("parts", shape.samples * shape.groups * count * 5),))


@lru_cache(maxsize=4096)
def backward(shape: GroupedShape, options: KernelOptions, batches: int = 1) -> LaunchSequence:
    """Return the launches that compute dx, and dscale and dbias, (batches, channels).

    The samples are divided into `batches`, with separate dscale and dbias.
    """
    arrays = ("dy", "x", "scale", "bias", "mask", "statistics")
    flags = _flags(options)
    shared: dict[str, int] = {}
    tiles = tile_whole_groups(shape, _limit(WHOLE_BACKWARD, shape, options))
    if tiles is not None:
        launch = partial(_launch, "backward", shape, tiles, _all(shape, tiles))
        launches = [launch("whole", (*arrays, "dx", *SUMS), 3, (_groups(shape),), flags)]
    else:
        tiles = tile_parts(shape, CHUNK_BACKWARD)
        count = tiles.parts * tiles.chunks(shape)
        few = count <= FEW_PARTS
        shared["parts"] = shape.samples * shape.groups * count * 2
        if not few:
            shared["merged"] = shape.samples * shape.groups * 2
        merged = ("MERGE_P2", power_of_two(count) if few else 1)
        used = (*arrays, "parts" if few else "merged", "dx")
        scalars = (_groups(shape), ("tiles", count if few else 1))
        launches = []
        for wave in _waves(shape, tiles, 2 * shape.item_bytes, options.waves):
            launch = partial(_launch, "backward", shape, tiles, wave)
            launches.append(
                launch("measure", (*arrays, "parts", *SUMS), 3, (_groups(shape),), flags)
            )
            if not few:
                launches.append(_merge("backward", wave, count, shape, "merged", ()))
            launches.append(launch("apply", used, 1, scalars, (merged, *flags)))
    rows = shape.samples * tiles.chunks(shape)
    shared |= dict.fromkeys(SUMS, rows * shape.channels)
    launches += _sum_rows(shape.channels, rows, batches, shared)
    return LaunchSequence(tuple(launches), tuple(shared.items()))


def _limit(limits: tuple[int, int], shape: GroupedShape, options: KernelOptions) -> int:
    """Return the most elements of a group that a tile can keep in registers."""
    halvings = (options.mask is not None) + (options.activation == "gelu")
    return limits[0 if shape.item_bytes == 2 else 1] >> halvings


class _Wave(NamedTuple):
    """Tiles that are computed together, and their groups."""

    begin: int
    tiles: int
    first_group: int
    groups: int


def _all(shape: GroupedShape, tiles: Tiles) -> _Wave:
    count = shape.samples * tiles.blocks(shape) * tiles.chunks(shape)
    return _Wave(0, count, 0, shape.samples * shape.groups)


def _waves(shape: GroupedShape, tiles: Tiles, item: int, wanted: bool) -> Iterator[_Wave]:
    """Split tiles into waves of whole groups, or of whole samples if tiles span groups."""
    everything = _all(shape, tiles)
    total = shape.samples * shape.channels * shape.positions * item
    by_group = shape.channels_first and tiles.groups(shape) == 1
    units = shape.samples * shape.groups if by_group else shape.samples
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


def _launch(
    module: str, shape: GroupedShape, tiles: Tiles, wave: _Wave, kernel: str, arrays: Any,
    written: int, scalars: Any, constants: Any,
) -> Launch:  # fmt: skip
    divisor = min(shape.positions & -shape.positions, 16)
    padded = power_of_two(tiles.width)
    return Launch(
        module, kernel, (wave.tiles,), arrays, written,
        (("steps", shape.positions // divisor), *scalars, ("begin_at", wave.begin)),
        (
            *constants, ("CHANNELS", shape.channels), ("GROUP_SIZE", shape.group_size),
            ("TILE_CHANNELS", tiles.width), ("TILE_CHANNELS_P2", padded),
            ("TILE_POSITIONS", tiles.length), ("DIVISOR", divisor), ("PARTS", tiles.parts),
            ("BLOCKS", tiles.blocks(shape)), ("GROUPS_P2", power_of_two(tiles.groups(shape))),
            ("CHANNELS_FIRST", int(shape.channels_first)), ("FULL", int(tiles.full(shape))),
        ),
        # In the backward pass a thread holds two arrays.
        warps_for(tiles.elements() * (2 if "dy" in arrays else 1)),
    )  # fmt: skip


def _merge(
    module: str, wave: _Wave, count: int, shape: GroupedShape, result: str, constants: Any
) -> Launch:  # fmt: skip
    at_once = min(power_of_two(count), MERGED_AT_ONCE)
    scalars: tuple[tuple[str, int], ...] = (("tiles", count), ("begin_at", wave.first_group))
    if constants:
        scalars = (*scalars, _groups(shape))
    return Launch(
        module, "merge", (wave.groups,), ("parts", result), 1, scalars,
        (*constants, ("MERGE_P2", at_once)), warps_for(8 * at_once),
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


def _groups(shape: GroupedShape) -> tuple[str, int]:
    return "groups", shape.samples * shape.groups


def _flags(options: KernelOptions) -> tuple[tuple[str, int], ...]:
    return (
        ("MASK", MASKS[options.mask]), ("SCALE", int(options.scale)), ("BIAS", int(options.bias)),
        ("ACTIVATION", ACTIVATIONS[options.activation]),
    )  # fmt: skip


def _largest_unit(epsilon: float) -> float:
    """Return the largest power of two that deviations may be multiplied by.

    With it, epsilon * unit**2 does not overflow. Smaller deviations are negligible next to epsilon.
    """
    exponent = 100.0 if epsilon == 0 else min(50.0 - 0.5 * math.log2(epsilon), 100.0)
    return 2.0 ** math.floor(exponent)
