"""The normalization of groups that are read twice, in Triton: `group`, or three kernels.

`group` measures one group after another and normalizes it while it is in the cache. Otherwise,
`measure` measures slabs channel by channel, `merge` merges them to groups, and `apply` normalizes.

Sums are of deviations from a pivot: the mean of the first elements that a program reads, at least
1/16 of all, so that its squared distance from the mean of all is at most 15 times their variance.
Mostly it is far less. Where it is more than `FAR`, so that more than three bits would cancel, or
squares are outside of float32's range, the program reads its elements again: it takes the mean,
and then deviations from it in a unit of their own. A round's tiles are added up before they are
added to the sums, which keeps chains of additions short.

A group's mean is kept as a pair (high, low), which is subtracted in this order. Statistics are
``(2, samples * groups, 2)``: the mean's two parts; 1 / sqrt(var + epsilon) and 1 / count. Parts are
``(samples, chunks, 5, channels)``: pivot, mean relative to it, sum of squared deviations from the
mean, the unit of these, and count.
"""

import triton
import triton.language as tl

from groupnorm.backends.kernels.gpu.compiled.elements import finite, normalized, unit_for
from groupnorm.backends.kernels.gpu.compiled.loops import (
    mask_at,
    offsets_in,
    slab_of,
    tile_in,
)
from groupnorm.backends.kernels.gpu.compiled.small import SHRINK, channel_values, keep_statistics
from groupnorm.backends.kernels.gpu.compiled.tiles import (
    UNSPECIALIZED,
    follow,
    over_positions,
    parameters_of,
    spread,
)

__all__ = ["apply", "group", "measure", "merge"]

# The mean square of deviations from a pivot, relative to the variance, up to which sums are exact
# enough: for random data it is about 1, for linear ramps at most 4.
FAR = tl.constexpr(8.0)


@triton.jit
def _deviations(
    x, mask, begin, rows, lanes, offsets, pivot, STRIDE: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, LAST: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Return a tile's deviations from a pivot, 0 for what is not counted, and what is counted.

    The last as a number for each position.
    """
    where, exists, counted, valid = tile_in(
        mask, begin, rows, lanes, offsets, STRIDE, TILE_POSITIONS, LAST, CHANNELS_FIRST, MASK
    )
    value = tl.load(x + where, mask=exists, other=0.0).to(tl.float32)
    deviation = value - spread(pivot, CHANNELS_FIRST)
    if LAST or MASK != 0:
        deviation = tl.where(counted, deviation, 0.0)
    return deviation, tl.where(valid, 1.0, 0.0)


@triton.jit
def _added(
    x, mask, rows, lanes, offsets, pivot, unit, sums, squares, number, STRIDE: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, UNROLL: tl.constexpr, EVEN: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Add deviations and their squares to the sums by thread, and counts by position to `number`.

    SCALED is whether they are multiplied by `unit`.
    """
    ROUND: tl.constexpr = TILE_POSITIONS * UNROLL
    whole = rows
    if not EVEN:
        whole = rows // ROUND * ROUND
    for begin in range(0, whole, ROUND):
        for tile in tl.static_range(UNROLL):
            deviation, more = _deviations(
                x, mask, begin + tile * TILE_POSITIONS, rows, lanes, offsets, pivot, STRIDE,
                TILE_POSITIONS, False, CHANNELS_FIRST, MASK,
            )  # fmt: skip
            if SCALED:
                deviation *= spread(unit, CHANNELS_FIRST)
            if tile == 0:
                of_round = deviation
                of_squares = deviation * deviation
            else:
                of_round += deviation
                of_squares += deviation * deviation
            number += more
        sums += of_round
        squares += of_squares
    if not EVEN:
        for begin in range(whole, rows, TILE_POSITIONS):
            deviation, more = _deviations(
                x, mask, begin, rows, lanes, offsets, pivot, STRIDE, TILE_POSITIONS, True,
                CHANNELS_FIRST, MASK,
            )  # fmt: skip
            if SCALED:
                deviation *= spread(unit, CHANNELS_FIRST)
            sums += deviation
            squares += deviation * deviation
            number += more
    return sums, squares, number


@triton.jit
def _sampled(
    x, mask, rows, lanes, offsets, STRIDE: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    SAMPLE: tl.constexpr, EVEN: tl.constexpr, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return the sums of the first SAMPLE tiles, and how many positions of them count."""
    sums = tl.zeros(offsets.shape, tl.float32)
    number = tl.zeros([TILE_POSITIONS], tl.float32)
    zero = tl.zeros_like(lanes).to(tl.float32)
    for tile in tl.static_range(SAMPLE):
        value, more = _deviations(
            x, mask, tile * TILE_POSITIONS, rows, lanes, offsets, zero, STRIDE, TILE_POSITIONS,
            not EVEN, CHANNELS_FIRST, MASK,
        )  # fmt: skip
        sums += value
        number += more
    if MASK != 0:
        count = tl.maximum(tl.sum(number, 0), 1.0)
    else:
        count = tl.minimum(rows, TILE_POSITIONS * SAMPLE).to(tl.float32)
    return over_positions(sums, CHANNELS_FIRST), count


@triton.jit
def _reached(
    x, mask, rows, lanes, offsets, pivot, reach, STRIDE: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return the sums of deviations times SHRINK, and the largest, at least `reach`, by thread."""
    sums = tl.zeros(offsets.shape, tl.float32)
    for begin in range(0, rows, TILE_POSITIONS):
        deviation, _ = _deviations(
            x, mask, begin, rows, lanes, offsets, pivot, STRIDE, TILE_POSITIONS, True,
            CHANNELS_FIRST, MASK,
        )  # fmt: skip
        sums += deviation * SHRINK
        reach = tl.maximum(reach, tl.abs(deviation))
    return sums, reach


@triton.jit
def _lost(squares, remaining, lanes, TINY: tl.constexpr):
    """Whether the squares of any channel are out of range, or cancelled; NaN included.

    TINY is whether squares that underflow count: beside a larger epsilon they do not.
    """
    lost = ((squares <= remaining * FAR) & (squares < 1e36)) == 0
    if TINY:
        lost = lost | (squares < 1e-26)
    return tl.max((lost & lanes).to(tl.int32), 0) > 0


@triton.jit
def _pair(high, low):
    """Return a sum as its rounded value and the rest."""
    total = high + low
    back = total - high
    return total, (high - (total - back)) + (low - back)


@triton.jit
def _rstd(squares, count, unit, EPSILON: tl.constexpr):
    """Return 1 / sqrt(var + epsilon); 1 / sqrt(1 + epsilon) of nothing."""
    variance = squares / tl.maximum(count, 1.0) + EPSILON * unit * unit
    variance = tl.where(variance == 0, 1.0, variance)  # any finite value
    return tl.where(count > 0, unit / tl.sqrt_rn(variance), 1.0 / (1.0 + EPSILON) ** 0.5)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def measure(
    x, mask, parts, steps, chunk, chunks, LARGEST_UNIT: tl.constexpr, TINY: tl.constexpr,
    CHANNELS: tl.constexpr, TILE_CHANNELS: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    UNROLL: tl.constexpr, DIVISOR: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    SAMPLE: tl.constexpr, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr,
    DEPENDENT: tl.constexpr = 0,
):  # fmt: skip
    """Measure each channel of a slab."""
    follow(DEPENDENT)
    sample, first, number, begin, mask, rows, lanes, offsets = slab_of(
        tl.program_id(0), mask, steps, chunk, chunks, CHANNELS, TILE_CHANNELS, TILE_POSITIONS,
        DIVISOR, BLOCKS, CHANNELS_FIRST, MASK,
    )  # fmt: skip
    STRIDE: tl.constexpr = 1 if CHANNELS_FIRST else CHANNELS
    x += begin
    of_first, first_count = _sampled(
        x, mask, rows, lanes, offsets, STRIDE, TILE_POSITIONS, SAMPLE, EVEN, CHANNELS_FIRST, MASK
    )
    pivot = of_first * (1.0 / first_count)  # of equal elements it is one, in full rounds
    unit = tl.zeros_like(pivot) + 1.0
    nothing = tl.zeros(offsets.shape, tl.float32)
    none = tl.zeros([TILE_POSITIONS], tl.float32)
    sums, squares, count = _added(
        x, mask, rows, lanes, offsets, pivot, unit, nothing, nothing, none, STRIDE,
        TILE_POSITIONS, UNROLL, EVEN, CHANNELS_FIRST, MASK, False,
    )  # fmt: skip
    if MASK != 0:
        total = tl.sum(count, 0)
    else:
        total = rows.to(tl.float32)
    inv_count = 1.0 / tl.maximum(total, 1.0)
    mean = over_positions(sums, CHANNELS_FIRST) * inv_count
    square = over_positions(squares, CHANNELS_FIRST)
    remaining = square - total * mean * mean
    if _lost(square, remaining, lanes, TINY):
        pivot = tl.where(finite(pivot), pivot, 0.0)
        reach = nothing
        for again in range(2):  # noqa: B007 - equal elements have exactly this mean the second time
            sums, reach = _reached(
                x, mask, rows, lanes, offsets, pivot, nothing, STRIDE, TILE_POSITIONS,
                CHANNELS_FIRST, MASK,
            )  # fmt: skip
            pivot += over_positions(sums, CHANNELS_FIRST) * inv_count / SHRINK
        unit = unit_for(tl.max(reach, 1 if CHANNELS_FIRST else 0), LARGEST_UNIT)
        sums, squares, count = _added(
            x, mask, rows, lanes, offsets, pivot, unit, nothing, nothing, none, STRIDE,
            TILE_POSITIONS, UNROLL, EVEN, CHANNELS_FIRST, MASK, True,
        )  # fmt: skip
        mean = over_positions(sums, CHANNELS_FIRST) * inv_count
        remaining = over_positions(squares, CHANNELS_FIRST) - total * mean * mean
        mean /= unit
    remaining = tl.where(remaining < 0, 0.0, remaining)  # keeps NaN
    part = sample.to(tl.int64) * chunks + number
    where = parts + part * (5 * CHANNELS) + first + tl.arange(0, TILE_CHANNELS)
    tl.store(where, pivot, mask=lanes)
    tl.store(where + CHANNELS, mean, mask=lanes)
    tl.store(where + 2 * CHANNELS, remaining, mask=lanes)
    tl.store(where + 3 * CHANNELS, unit, mask=lanes)
    tl.store(where + 4 * CHANNELS, tl.zeros_like(pivot) + total, mask=lanes)


@triton.jit
def _part(
    parts, begin, count, CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Return pivots, means, squares, units and counts of AT_ONCE parts; `count` of all exist."""
    number = begin + tl.arange(0, AT_ONCE)
    there = number < count
    where = parts + (number // GROUP_SIZE).to(tl.int64) * (5 * CHANNELS) + number % GROUP_SIZE
    counts = tl.load(where + 4 * CHANNELS, mask=there, other=0.0)
    there = there & (counts > 0)
    return (
        tl.load(where, mask=there, other=0.0),
        tl.load(where + CHANNELS, mask=there, other=0.0),
        tl.load(where + 2 * CHANNELS, mask=there, other=0.0),
        tl.load(where + 3 * CHANNELS, mask=there, other=1.0),
        counts,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge(
    parts, statistics, chunks, groups, EPSILON: tl.constexpr, LARGEST_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr, AT_ONCE: tl.constexpr,
    DEPENDENT: tl.constexpr = 0,
):  # fmt: skip
    """Merge the parts of a group: its channels in each of the chunks."""
    follow(DEPENDENT)
    group = tl.program_id(0).to(tl.int64)
    sample = group // (CHANNELS // GROUP_SIZE)
    channel = group % (CHANNELS // GROUP_SIZE) * GROUP_SIZE
    parts += sample * chunks * (5 * CHANNELS) + channel
    count = chunks * GROUP_SIZE
    # One of the means at first; all are relative to it.
    base = tl.load(parts) + tl.load(parts + CHANNELS)
    total = tl.zeros_like(base)
    enough = total
    for again in range(2):  # noqa: B007 - the second time it is exactly the mean of equal means
        numbers = tl.zeros([AT_ONCE], tl.float32)
        sums = tl.zeros([AT_ONCE], tl.float32)
        for begin in range(0, count, AT_ONCE):
            pivot, mean, _, _, number = _part(parts, begin, count, CHANNELS, GROUP_SIZE, AT_ONCE)
            numbers += number
            sums += tl.where(number > 0, ((pivot - base) + mean) * SHRINK * number, 0.0)
        total = tl.sum(numbers, 0)
        enough = tl.maximum(total, 1.0)
        base += tl.sum(sums, 0) / enough / SHRINK
    # Relative to about the mean: what rounding left of it, and the largest deviation.
    sums = tl.zeros([AT_ONCE], tl.float32)
    reach = tl.zeros([AT_ONCE], tl.float32)
    for begin in range(0, count, AT_ONCE):
        pivot, mean, square, unit, number = _part(
            parts, begin, count, CHANNELS, GROUP_SIZE, AT_ONCE
        )
        deviation = tl.where(number > 0, (pivot - base) + mean, 0.0)
        sums += deviation * SHRINK * number
        within = tl.sqrt_rn(square) / unit
        reach = tl.maximum(reach, tl.maximum(tl.abs(deviation), within))
    missed = tl.sum(sums, 0) / enough / SHRINK
    whole = unit_for(tl.max(reach, 0), LARGEST_UNIT)
    squares = tl.zeros([AT_ONCE], tl.float32)
    for begin in range(0, count, AT_ONCE):
        pivot, mean, square, unit, number = _part(
            parts, begin, count, CHANNELS, GROUP_SIZE, AT_ONCE
        )
        deviation = tl.where(number > 0, ((pivot - base) + mean) - missed, 0.0) * whole
        finer = whole / unit
        squares += square * finer * finer + deviation * deviation * number
    rstd = _rstd(tl.sum(squares, 0), total, whole, EPSILON)
    high, low = _pair(base, missed)
    inv_count = tl.where(total > 0, 1.0 / enough, 0.0)
    keep_statistics(statistics, group, groups, high, low, rstd, inv_count, group >= 0)


@triton.jit
def _written(
    x, y, mask, begin, rows, lanes, offsets, high, factor, shift, STRIDE: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, LAST: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    MASK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    where, exists, counted, _ = tile_in(
        mask, begin, rows, lanes, offsets, STRIDE, TILE_POSITIONS, LAST, CHANNELS_FIRST, MASK
    )
    value = tl.load(x + where, mask=exists, other=0.0).to(tl.float32)
    found = normalized(
        value, counted, spread(high, CHANNELS_FIRST), spread(factor, CHANNELS_FIRST),
        spread(shift, CHANNELS_FIRST), MASK, ACTIVATION,
    )  # fmt: skip
    tl.store(y + where, found.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _write(
    x, y, mask, rows, lanes, offsets, high, factor, shift, STRIDE: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Normalize a slab."""
    whole = rows
    if not EVEN:
        whole = rows // TILE_POSITIONS * TILE_POSITIONS
    for begin in tl.range(0, whole, TILE_POSITIONS, num_stages=STAGES):
        _written(
            x, y, mask, begin, rows, lanes, offsets, high, factor, shift, STRIDE, TILE_POSITIONS,
            False, CHANNELS_FIRST, MASK, ACTIVATION,
        )  # fmt: skip
    if not EVEN:  # noqa: SIM102 - known when this is compiled, the other condition is not
        if whole < rows:
            _written(
                x, y, mask, whole, rows, lanes, offsets, high, factor, shift, STRIDE,
                TILE_POSITIONS, True, CHANNELS_FIRST, MASK, ACTIVATION,
            )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def apply(
    x, scale, bias, mask, statistics, y, steps, chunk, chunks, groups, CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, TILE_CHANNELS: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    DIVISOR: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr = 0,
):  # fmt: skip
    """Normalize a slab."""
    follow(DEPENDENT)
    # In reverse order: the slabs measured last may still be in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, first, _, begin, mask, rows, lanes, offsets = slab_of(
        pid, mask, steps, chunk, chunks, CHANNELS, TILE_CHANNELS, TILE_POSITIONS,
        DIVISOR, BLOCKS, CHANNELS_FIRST, MASK,
    )  # fmt: skip
    high, rstd, shift, _, factor, offset = channel_values(
        statistics, scale, bias, groups, sample, first, lanes, CHANNELS, GROUP_SIZE,
        TILE_CHANNELS, SCALE, BIAS, ROWS,
    )  # fmt: skip
    _write(
        x + begin, y + begin, mask, rows, lanes, offsets, high, rstd * factor,
        shift * factor + offset, 1 if CHANNELS_FIRST else CHANNELS, TILE_POSITIONS, EVEN, STAGES,
        CHANNELS_FIRST, MASK, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def group(
    x, scale, bias, mask, y, statistics, steps, groups, EPSILON: tl.constexpr,
    LARGEST_UNIT: tl.constexpr, TINY: tl.constexpr, CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, TILE_CHANNELS: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    UNROLL: tl.constexpr, DIVISOR: tl.constexpr, EVEN: tl.constexpr, SAMPLE: tl.constexpr,
    MASK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Normalize a group, whose channels come before positions, TILE_CHANNELS after another."""
    pid = tl.program_id(0)
    sample = pid // (CHANNELS // GROUP_SIZE)
    first = pid % (CHANNELS // GROUP_SIZE) * GROUP_SIZE
    rows = steps * DIVISOR
    lanes = tl.full([TILE_CHANNELS], 1, tl.int1)
    begin = pid.to(tl.int64) * GROUP_SIZE * rows
    mask = mask_at(mask, sample, tl.cast(0, tl.int64), steps, DIVISOR, MASK)
    offsets = offsets_in(steps, CHANNELS, TILE_CHANNELS, TILE_POSITIONS, DIVISOR, True)
    of_first, first_count = _sampled(
        x + begin, mask, rows, lanes, offsets, 1, TILE_POSITIONS, SAMPLE, EVEN, True, MASK
    )
    pivot = tl.zeros_like(of_first) + tl.sum(of_first, 0) / (first_count * TILE_CHANNELS)
    unit = tl.zeros_like(pivot) + 1.0
    nothing = tl.zeros(offsets.shape, tl.float32)
    none = tl.zeros([TILE_POSITIONS], tl.float32)
    sums, squares, count = nothing, nothing, none
    for channel in range(0, GROUP_SIZE, TILE_CHANNELS):
        sums, squares, count = _added(
            x + begin + tl.cast(channel, tl.int64) * rows, mask, rows, lanes, offsets, pivot, unit,
            sums, squares, count, 1, TILE_POSITIONS, UNROLL, EVEN, True, MASK, False,
        )  # fmt: skip
    if MASK != 0:
        total = tl.sum(count, 0) * TILE_CHANNELS
    else:
        total = rows.to(tl.float32) * GROUP_SIZE
    enough = tl.maximum(total, 1.0)
    mean = tl.sum(over_positions(sums, True), 0) / enough
    square = tl.sum(over_positions(squares, True), 0)
    remaining = square - total * mean * mean
    if _lost(tl.zeros_like(pivot) + square, remaining, lanes, TINY):
        pivot = tl.where(finite(pivot), pivot, 0.0)
        reach = nothing
        for again in range(2):  # noqa: B007 - equal elements have exactly this mean the second time
            sums, reach = nothing, nothing
            for channel in range(0, GROUP_SIZE, TILE_CHANNELS):
                more, further = _reached(
                    x + begin + tl.cast(channel, tl.int64) * rows, mask, rows, lanes, offsets,
                    pivot, reach, 1, TILE_POSITIONS, True, MASK,
                )  # fmt: skip
                sums += more
                reach = further
            pivot += tl.sum(over_positions(sums, True), 0) / enough / SHRINK
        unit = unit_for(tl.zeros_like(pivot) + tl.max(tl.max(reach, 1), 0), LARGEST_UNIT)
        sums, squares, count = nothing, nothing, none
        for channel in range(0, GROUP_SIZE, TILE_CHANNELS):
            sums, squares, count = _added(
                x + begin + tl.cast(channel, tl.int64) * rows, mask, rows, lanes, offsets, pivot,
                unit, sums, squares, count, 1, TILE_POSITIONS, UNROLL, EVEN, True, MASK, True,
            )  # fmt: skip
        mean = tl.sum(over_positions(sums, True), 0) / enough
        remaining = tl.sum(over_positions(squares, True), 0) - total * mean * mean
    remaining = tl.where(remaining < 0, 0.0, remaining)  # keeps NaN
    rstd = _rstd(remaining, total, unit, EPSILON)
    high, low = _pair(pivot, mean / unit)
    inv_count = tl.zeros_like(rstd) + tl.where(total > 0, 1.0 / enough, 0.0)
    write = tl.arange(0, TILE_CHANNELS) == 0
    where = pid + tl.zeros([TILE_CHANNELS], tl.int64)
    keep_statistics(statistics, where, groups, high, low, rstd, inv_count, write)
    wide = offsets_in(steps, CHANNELS, TILE_CHANNELS, TILE_POSITIONS * UNROLL, DIVISOR, True)
    for done in range(0, GROUP_SIZE, TILE_CHANNELS):
        channel = GROUP_SIZE - TILE_CHANNELS - done  # what was read last is next to the processor
        factor, offset = parameters_of(
            scale, bias, sample, first + channel, lanes, CHANNELS, TILE_CHANNELS, SCALE, BIAS, ROWS
        )
        factor *= rstd
        shift = offset - low * factor
        at = begin + tl.cast(channel, tl.int64) * rows
        _write(
            x + at, y + at, mask, rows, lanes, wide, high, factor, shift, 1,
            TILE_POSITIONS * UNROLL, EVEN, 1, True, MASK, ACTIVATION,
        )  # fmt: skip
