"""Small groups in Triton: whole groups in one tile each, which are read once, into registers.

Statistics are measured relative to one element of the group, with a scale per group, and corrected
for the rounding error of the mean. Statistics and gradients are as in ``forward`` and ``backward``.
"""

import triton
import triton.language as tl

from groupnorm.backends.kernels.gpu.compiled.elements import (
    gradient_of_x,
    normalized,
    pulled_back,
    unit_for,
)
from groupnorm.backends.kernels.gpu.compiled.tiles import (
    UNSPECIALIZED,
    follow,
    group_of,
    leads,
    over_group,
    over_positions,
    parameters_of,
    spread,
    summed,
    tile_of,
    top_of_group,
)

__all__ = ["SHRINK", "keep_statistics", "normalize", "pull_back"]

# Sums of deviations multiplied by this do not overflow. Deviations that underflow are corrected by
# the second sum, of deviations from the mean.
SHRINK = tl.constexpr(2.0**-24)


@triton.jit
def keep_statistics(statistics, group, groups, mean, missed, rstd, inv_count, write):
    """Write the statistics of groups."""
    where = statistics + group * 2
    tl.store(where, mean, mask=write)
    tl.store(where + 1, missed, mask=write)
    where += tl.cast(groups, tl.int64) * 2
    tl.store(where, rstd, mask=write)
    tl.store(where + 1, inv_count, mask=write)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def normalize(
    x, scale, bias, mask, y, statistics, steps, groups, EPSILON: tl.constexpr,
    LARGEST_UNIT: tl.constexpr, CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    DIVISOR: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr, GROUPS_P2: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Compute y and the statistics."""
    sample, first, begin, offsets, exists, channel_exists, counted = tile_of(
        tl.program_id(0), mask, steps, CHANNELS, TILE_CHANNELS, TILE_CHANNELS_P2, TILE_POSITIONS,
        DIVISOR, BLOCKS, CHANNELS_FIRST, FULL, MASK,
    )  # fmt: skip
    value = tl.load(x + begin + offsets, mask=exists, other=0.0).to(tl.float32)
    if MASK == 0:
        elements = (tl.cast(steps, tl.int64) * (GROUP_SIZE * DIVISOR)).to(tl.float32)
        count = tl.zeros([TILE_CHANNELS_P2], tl.float32) + elements
        lane = tl.arange(0, TILE_CHANNELS_P2)  # the first element of each group
        there = tl.minimum(lane // GROUP_SIZE * GROUP_SIZE, CHANNELS - 1 - first)
        if CHANNELS_FIRST:
            there = there * (tl.cast(steps, tl.int64) * DIVISOR)
        pivot = tl.load(x + begin + there).to(tl.float32)
    else:
        count = summed(
            tl.where(counted, 1.0, 0.0), GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2, CHANNELS_FIRST
        )
        low: tl.constexpr = float("-inf")
        pivot = top_of_group(
            tl.where(counted, value, low), low, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2,
            CHANNELS_FIRST,
        )  # fmt: skip
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
    unit = unit_for(reach, LARGEST_UNIT)
    deviation = (value - spread(mean, CHANNELS_FIRST)) * spread(unit, CHANNELS_FIRST)
    valid = tl.where(counted, deviation, 0.0)
    missed = summed(valid, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2, CHANNELS_FIRST) / enough
    squares = (
        summed(valid * valid, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2, CHANNELS_FIRST)
        - count * missed * missed
    )
    squares = tl.where(squares < 0, 0.0, squares)  # keeps NaN
    variance = squares / enough + EPSILON * unit * unit
    variance = tl.where(variance == 0, 1.0, variance)  # any finite value
    rstd = unit / tl.sqrt_rn(variance)
    missed /= unit
    if MASK != 0:  # empty groups have mean 0 and variance 1
        rstd = tl.where(count > 0, rstd, 1.0 / (1.0 + EPSILON) ** 0.5)
    factor, offset = parameters_of(
        scale, bias, sample, first, channel_exists, CHANNELS, TILE_CHANNELS_P2, SCALE, BIAS, ROWS
    )
    factor *= rstd
    shift = offset - missed * factor
    found = normalized(
        value, counted, spread(mean, CHANNELS_FIRST), spread(factor, CHANNELS_FIRST),
        spread(shift, CHANNELS_FIRST), MASK, ACTIVATION,
    )  # fmt: skip
    tl.store(y + begin + offsets, found.to(y.dtype.element_ty), mask=exists)
    group = sample.to(tl.int64) * (CHANNELS // GROUP_SIZE) + group_of(
        first, GROUP_SIZE, TILE_CHANNELS_P2
    )
    inv_count = tl.where(count > 0, 1.0 / enough, 0.0)
    write = leads(GROUP_SIZE, TILE_CHANNELS_P2) & channel_exists
    keep_statistics(statistics, group, groups, mean, missed, rstd, inv_count, write)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def pull_back(
    dy, x, scale, bias, mask, statistics, dx, products, gradients, steps, groups,
    CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    TILE_CHANNELS_P2: tl.constexpr, TILE_POSITIONS: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCKS: tl.constexpr, FULL: tl.constexpr, GROUPS_P2: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr = 0,
):  # fmt: skip
    """Compute dx, and the sums for the gradients of scale and bias of each sample."""
    follow(DEPENDENT)
    sample, first, begin, offsets, exists, channel_exists, counted = tile_of(
        tl.program_id(0), mask, steps, CHANNELS, TILE_CHANNELS, TILE_CHANNELS_P2, TILE_POSITIONS,
        DIVISOR, BLOCKS, CHANNELS_FIRST, FULL, MASK,
    )  # fmt: skip
    given = tl.load(x + begin + offsets, mask=exists, other=0.0).to(tl.float32)
    gradient = tl.load(dy + begin + offsets, mask=exists, other=0.0).to(tl.float32)
    high, rstd, shift, inv_count, factor, offset = channel_values(
        statistics, scale, bias, groups, sample, first, channel_exists, CHANNELS, GROUP_SIZE,
        TILE_CHANNELS_P2, SCALE, BIAS, ROWS,
    )  # fmt: skip
    xhat, gradient, constant = pulled_back(
        given, gradient, exists, counted, spread(high, CHANNELS_FIRST),
        spread(rstd, CHANNELS_FIRST), spread(shift, CHANNELS_FIRST),
        spread(factor, CHANNELS_FIRST), spread(offset, CHANNELS_FIRST), True, MASK, ACTIVATION,
    )  # fmt: skip
    of_gradients = over_positions(gradient, CHANNELS_FIRST)
    of_products = over_positions(gradient * xhat, CHANNELS_FIRST)
    mean = over_group(of_gradients * factor, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2) * inv_count
    mean_product = (
        over_group(of_products * factor, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2) * inv_count
    )
    found = gradient_of_x(
        xhat, gradient, constant, counted, spread(factor * rstd, CHANNELS_FIRST),
        spread(mean * rstd, CHANNELS_FIRST), spread(mean_product * rstd, CHANNELS_FIRST), MASK,
    )  # fmt: skip
    tl.store(dx + begin + offsets, found.to(dx.dtype.element_ty), mask=exists)
    where = sample.to(tl.int64) * CHANNELS + first + tl.arange(0, TILE_CHANNELS_P2)
    tl.store(products + where, of_products, mask=channel_exists)
    tl.store(gradients + where, of_gradients, mask=channel_exists)


@triton.jit
def channel_values(
    statistics, scale, bias, groups, sample, first, exists, CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, LANES: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Return the statistics of each channel's group, and its scale and bias.

    The statistics as the mean's first part, 1 / std, minus the second part of the mean times that,
    and 1 / count.
    """
    group = sample.to(tl.int64) * (CHANNELS // GROUP_SIZE) + group_of(first, GROUP_SIZE, LANES)
    where = statistics + group * 2
    high = tl.load(where, mask=exists, other=0.0)
    low = tl.load(where + 1, mask=exists, other=0.0)
    where += tl.cast(groups, tl.int64) * 2
    rstd = tl.load(where, mask=exists, other=0.0)
    inv_count = tl.load(where + 1, mask=exists, other=0.0)
    factor, offset = parameters_of(
        scale, bias, sample, first, exists, CHANNELS, LANES, SCALE, BIAS, ROWS
    )
    return high, rstd, -low * rstd, inv_count, factor, offset
