"""The normalization in Triton: whole groups in one tile each, or statistics by tiles, then apply.

A tile's statistics are measured relative to one of its elements, with a scale per group, and
corrected for the rounding error of the mean. Tiles are merged in float64, in an order that depends
on the shape alone. A group's mean is kept as a pair (high, low), which is subtracted in this order.

Statistics are ``(2, samples * groups, 2)``: the mean's two parts; 1 / sqrt(var + epsilon) and
1 / count. Parts are ``(samples * groups, tiles of a group, 5)``.
"""

import triton
import triton.language as tl

from groupnorm.backends.kernels.gpu.compiled.elements import (
    activated,
    clamp_masked,
    clamp_normalized,
)
from groupnorm.backends.kernels.gpu.compiled.tiles import (
    UNSPECIALIZED,
    chunks_of,
    group_of,
    leads,
    parameter_of,
    spread,
    spread_groups,
    summed,
    tile_of,
    top_of_group,
)

__all__ = ["apply", "measure", "merge", "whole"]

# Sums of deviations multiplied by this do not overflow. Deviations that underflow are corrected by
# the second sum, of deviations from the mean.
SHRINK = tl.constexpr(2.0**-24)


@triton.jit
def _measured(
    value, counted, elements, x, begin, first, steps, CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, DIVISOR: tl.constexpr,
    PARTS: tl.constexpr, GROUPS_P2: tl.constexpr, MASK: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    LARGEST_UNIT: tl.constexpr,
):  # fmt: skip
    """Return per lane: count, max(count, 1), mean, its error, sum of squares; the unit of both."""
    if MASK == 0:
        count = tl.zeros([TILE_CHANNELS_P2], tl.float32) + elements
        # The first element of the group, or of the tile if it is a part of a group.
        if PARTS == 1:
            lane = tl.arange(0, TILE_CHANNELS_P2)
            there = tl.minimum(lane // GROUP_SIZE * GROUP_SIZE, CHANNELS - 1 - first)
            if CHANNELS_FIRST:
                there = there * (tl.cast(steps, tl.int64) * DIVISOR)
        else:
            there = tl.zeros([TILE_CHANNELS_P2], tl.int32)
        pivot = tl.load(x + begin + there).to(tl.float32)
    else:
        count = summed(
            tl.where(counted, 1.0, 0.0), GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2, CHANNELS_FIRST
        )
        low: tl.constexpr = float("-inf")
        pivot = top_of_group(
            tl.where(counted, value, low),
            low,
            GROUP_SIZE,
            TILE_CHANNELS_P2,
            GROUPS_P2,
            CHANNELS_FIRST,
        )
        pivot = tl.where(count > 0, pivot, 0.0)
    enough = tl.maximum(count, 1.0)
    deviation = tl.where(counted, value - spread(pivot, CHANNELS_FIRST), 0.0)
    reach = top_of_group(
        tl.abs(deviation), 0.0, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2, CHANNELS_FIRST
    )
    mean = (
        pivot
        + summed(deviation * SHRINK, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2, CHANNELS_FIRST)
        / enough
        / SHRINK
    )
    # Squares must neither overflow nor underflow: a power of two scales deviations to about 1.
    exponent = reach.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 1 << 23), 253 << 23)
    unit = tl.minimum(((254 << 23) - exponent).to(tl.float32, bitcast=True), LARGEST_UNIT)
    deviation = (value - spread(mean, CHANNELS_FIRST)) * spread(unit, CHANNELS_FIRST)
    valid = tl.where(counted, deviation, 0.0)
    missed = summed(valid, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2, CHANNELS_FIRST) / enough
    squares = (
        summed(valid * valid, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2, CHANNELS_FIRST)
        - count * missed * missed
    )
    squares = tl.where(squares < 0, 0.0, squares)  # keeps NaN
    return count, enough, mean, missed, squares, unit


@triton.jit
def _read(x, begin, offsets, exists, counted, MASK: tl.constexpr):
    value = tl.load(x + begin + offsets, mask=exists, other=0.0).to(tl.float32)
    if MASK != 0:
        value = tl.where(counted, value, clamp_masked(value))
    return value


@triton.jit
def _write(
    y, deviation, factor, bias, begin, offsets, exists, counted, first, channel_exists,
    TILE_CHANNELS_P2: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Write activation(deviation * factor + bias)."""
    z = deviation * spread(factor, CHANNELS_FIRST)
    if BIAS:
        z += spread(parameter_of(bias, first, channel_exists, TILE_CHANNELS_P2), CHANNELS_FIRST)
    if MASK != 0:  # an activation of inf may be NaN
        z = tl.where(counted, z, clamp_normalized(z))
    tl.store(y + begin + offsets, activated(z, ACTIVATION).to(y.dtype.element_ty), mask=exists)


@triton.jit
def _keep(statistics, group, groups, mean, missed, rstd, inv_count, write):
    """Write the statistics of groups."""
    where = statistics + group * 2
    tl.store(where, mean, mask=write)
    tl.store(where + 1, missed, mask=write)
    where += tl.cast(groups, tl.int64) * 2
    tl.store(where, rstd, mask=write)
    tl.store(where + 1, inv_count, mask=write)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def whole(
    x, scale, bias, mask, y, statistics, steps, groups, begin_at, EPSILON: tl.constexpr,
    LARGEST_UNIT: tl.constexpr, CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    DIVISOR: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr,
    GROUPS_P2: tl.constexpr, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Normalize groups that fit a tile."""
    pid = tl.program_id(0) + begin_at
    sample, first, _, _, begin, offsets, exists, channel_exists, counted = tile_of(
        pid,
        mask,
        steps,
        CHANNELS,
        GROUP_SIZE,
        TILE_CHANNELS,
        TILE_CHANNELS_P2,
        TILE_POSITIONS,
        DIVISOR,
        PARTS,
        BLOCKS,
        CHANNELS_FIRST,
        FULL,
        MASK,
    )
    value = _read(x, begin, offsets, exists, counted, MASK)
    elements = (tl.cast(steps, tl.int64) * (GROUP_SIZE * DIVISOR)).to(tl.float32)
    count, enough, mean, missed, squares, unit = _measured(
        value, counted, elements, x, begin, first, steps, CHANNELS, GROUP_SIZE, TILE_CHANNELS_P2,
        DIVISOR, PARTS, GROUPS_P2, MASK, CHANNELS_FIRST, LARGEST_UNIT,
    )  # fmt: skip
    variance = squares / enough + EPSILON * unit * unit
    variance = tl.where(variance == 0, 1.0, variance)  # any finite value
    rstd = unit / tl.sqrt_rn(variance)
    missed /= unit
    if MASK != 0:  # empty groups have mean 0 and variance 1
        rstd = tl.where(count > 0, rstd, 1.0 / (1.0 + EPSILON) ** 0.5)
    factor = rstd
    if SCALE:
        factor *= parameter_of(scale, first, channel_exists, TILE_CHANNELS_P2)
    _write(
        y, (value - spread(mean, CHANNELS_FIRST)) - spread(missed, CHANNELS_FIRST), factor, bias,
        begin, offsets, exists, counted, first, channel_exists, TILE_CHANNELS_P2, BIAS, ACTIVATION,
        CHANNELS_FIRST, MASK,
    )  # fmt: skip
    group = sample.to(tl.int64) * (CHANNELS // GROUP_SIZE) + group_of(
        first, GROUP_SIZE, TILE_CHANNELS_P2
    )
    inv_count = tl.where(count > 0, 1.0 / enough, 0.0)
    write = leads(GROUP_SIZE, TILE_CHANNELS_P2, PARTS) & channel_exists
    _keep(statistics, group, groups, mean, missed, rstd, inv_count, write)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def measure(
    x, mask, parts, steps, begin_at, LARGEST_UNIT: tl.constexpr, CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, TILE_CHANNELS: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, DIVISOR: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr,
    FULL: tl.constexpr, GROUPS_P2: tl.constexpr, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Measure the part of each group that is in a tile."""
    pid = tl.program_id(0) + begin_at
    sample, first, part, chunk, begin, offsets, exists, channel_exists, counted = tile_of(
        pid,
        mask,
        steps,
        CHANNELS,
        GROUP_SIZE,
        TILE_CHANNELS,
        TILE_CHANNELS_P2,
        TILE_POSITIONS,
        DIVISOR,
        PARTS,
        BLOCKS,
        CHANNELS_FIRST,
        FULL,
        MASK,
    )
    value = _read(x, begin, offsets, exists, counted, MASK)
    positions = tl.minimum(
        tl.cast(steps, tl.int64) * DIVISOR - chunk.to(tl.int64) * TILE_POSITIONS, TILE_POSITIONS
    )
    channels = (
        tl.minimum(GROUP_SIZE - part * TILE_CHANNELS, TILE_CHANNELS) if PARTS > 1 else GROUP_SIZE
    )
    elements = (positions * channels).to(tl.float32)
    count, _, mean, missed, squares, unit = _measured(
        value, counted, elements, x, begin, first, steps, CHANNELS, GROUP_SIZE, TILE_CHANNELS_P2,
        DIVISOR, PARTS, GROUPS_P2, MASK, CHANNELS_FIRST, LARGEST_UNIT,
    )  # fmt: skip
    chunks = chunks_of(steps, DIVISOR, TILE_POSITIONS)
    group = sample.to(tl.int64) * (CHANNELS // GROUP_SIZE) + group_of(
        first, GROUP_SIZE, TILE_CHANNELS_P2
    )
    where = parts + (group * (PARTS * chunks) + part * chunks + chunk) * 5
    write = leads(GROUP_SIZE, TILE_CHANNELS_P2, PARTS) & channel_exists
    tl.store(where, count, mask=write)
    tl.store(where + 1, mean, mask=write)
    tl.store(where + 2, missed / unit, mask=write)
    tl.store(where + 3, squares, mask=write)
    tl.store(where + 4, unit, mask=write)


@triton.jit
def _merged(parts, group, exists, begin, tiles, MERGE_P2: tl.constexpr):
    """Merge up to MERGE_P2 parts of groups; return count, mean and sum of squares in float64."""
    number = begin + tl.arange(0, MERGE_P2)
    there = (number < tiles)[:, None] & exists[None, :]
    where = parts + (group[None, :] * tiles + number[:, None]) * 5
    count = tl.load(where, mask=there, other=0.0)
    mean = tl.load(where + 1, mask=there, other=0.0)
    missed = tl.load(where + 2, mask=there, other=0.0)
    squares = tl.load(where + 3, mask=there, other=0.0)
    unit = tl.load(where + 4, mask=there, other=1.0)
    # Relative to one of the means, so that equal means are merged exactly.
    base = tl.max(tl.where(count > 0, mean, float("-inf")), 0)
    total = tl.sum(count.to(tl.float64), 0)
    base = tl.where(total > 0, base, 0.0).to(tl.float64)
    enough = tl.where(total > 0, total, 1.0)
    weight = count.to(tl.float64)
    deviation = (mean.to(tl.float64) - base[None, :]) + missed.to(tl.float64)
    deviation = tl.where(count > 0, deviation, 0.0)
    delta = tl.sum(weight * deviation, 0) / enough
    deviation -= delta[None, :]
    unit = unit.to(tl.float64)
    squares = tl.sum(squares.to(tl.float64) / (unit * unit) + weight * deviation * deviation, 0)
    return total, base + delta, squares


@triton.jit
def _finished(total, mean, squares, EPSILON: tl.constexpr):
    """Return the mean as a pair, 1 / sqrt(var + epsilon), and 1 / count, in float32."""
    enough = tl.where(total > 0, total, 1.0)
    variance = squares / enough + EPSILON
    variance = tl.where(variance == 0, 1.0, variance)
    variance = tl.where(total > 0, variance, 1.0 + EPSILON)
    rstd = (1.0 / tl.sqrt(variance)).to(tl.float32)
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    inv_count = tl.where(total > 0, 1.0 / enough, 0.0).to(tl.float32)
    return high, low, rstd, inv_count


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge(
    parts, statistics, tiles, begin_at, groups, EPSILON: tl.constexpr, MERGE_P2: tl.constexpr
):
    """Merge all tiles of a group, if there are many."""
    group = (tl.program_id(0) + begin_at).to(tl.int64) + tl.arange(0, 1)
    exists = group >= 0
    total, mean, squares = _merged(parts, group, exists, 0, tiles, MERGE_P2)
    for begin in range(MERGE_P2, tiles, MERGE_P2):
        more, other, other_squares = _merged(parts, group, exists, begin, tiles, MERGE_P2)
        both = tl.where(total + more > 0, total + more, 1.0)
        delta = tl.where((total > 0) & (more > 0), other - mean, 0.0)
        mean = tl.where(total > 0, mean, other) + delta * (more / both)
        squares += other_squares + delta * delta * (total * more / both)
        total += more
    high, low, rstd, inv_count = _finished(total, mean, squares, EPSILON)
    _keep(statistics, group, groups, high, low, rstd, inv_count, exists)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def apply(
    x, scale, bias, mask, parts, y, statistics, steps, groups, begin_at, EPSILON: tl.constexpr,
    MERGE_P2: tl.constexpr, CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    DIVISOR: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr,
    GROUPS_P2: tl.constexpr, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Normalize from at most MERGE_P2 parts and write the statistics; if 0, read them instead."""
    # In reverse order: the tiles measured last may still be in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0) + begin_at
    sample, first, part, chunk, begin, offsets, exists, channel_exists, counted = tile_of(
        pid,
        mask,
        steps,
        CHANNELS,
        GROUP_SIZE,
        TILE_CHANNELS,
        TILE_CHANNELS_P2,
        TILE_POSITIONS,
        DIVISOR,
        PARTS,
        BLOCKS,
        CHANNELS_FIRST,
        FULL,
        MASK,
    )
    value = _read(x, begin, offsets, exists, counted, MASK)
    lane_group = sample.to(tl.int64) * (CHANNELS // GROUP_SIZE) + group_of(
        first, GROUP_SIZE, TILE_CHANNELS_P2
    )
    if MERGE_P2 == 0:
        where = parts + lane_group * 2
        high = tl.load(where, mask=channel_exists, other=0.0)
        low = tl.load(where + 1, mask=channel_exists, other=0.0)
        rstd = tl.load(where + tl.cast(groups, tl.int64) * 2, mask=channel_exists, other=0.0)
    else:
        chunks = chunks_of(steps, DIVISOR, TILE_POSITIONS)
        number = first // GROUP_SIZE + tl.arange(0, GROUPS_P2)
        group = sample.to(tl.int64) * (CHANNELS // GROUP_SIZE) + number
        there = number < CHANNELS // GROUP_SIZE
        total, mean, squares = _merged(parts, group, there, 0, PARTS * chunks, MERGE_P2)
        high, low, rstd, inv_count = _finished(total, mean, squares, EPSILON)
        if (part == 0) & (chunk == 0):
            mine = there & (tl.arange(0, GROUPS_P2) * GROUP_SIZE < TILE_CHANNELS)
            _keep(statistics, group, groups, high, low, rstd, inv_count, mine)
        high = spread_groups(high, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2)
        low = spread_groups(low, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2)
        rstd = spread_groups(rstd, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2)
    factor = rstd
    if SCALE:
        factor *= parameter_of(scale, first, channel_exists, TILE_CHANNELS_P2)
    _write(
        y, (value - spread(high, CHANNELS_FIRST)) - spread(low, CHANNELS_FIRST), factor, bias,
        begin, offsets, exists, counted, first, channel_exists, TILE_CHANNELS_P2, BIAS, ACTIVATION,
        CHANNELS_FIRST, MASK,
    )  # fmt: skip
