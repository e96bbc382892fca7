"""The backward pass in Triton: whole groups in one tile each, or sums by tiles, then apply.

Let ``g`` be the gradient before the activation, and ``S1 = sum(g)`` and ``S2 = sum(g xhat)`` the
sums over the positions of a channel. Summed over samples, S1 and S2 are the gradients of bias and
scale. With ``p`` and ``q`` the sums of ``scale S1`` and ``scale S2`` over a group, divided by its
count, and ``m`` the mask, ``dx = rstd (scale g - m (p + xhat q))``.

S2 and S1 are written as ``products`` and ``gradients``, (rows, channels), with a row for each chunk
of each sample. Parts are ``(samples * groups, tiles of a group, 2)``.
"""

import triton
import triton.language as tl

from groupnorm.backends.kernels.gpu.compiled.elements import (
    activation_vjp,
    clamp_masked,
    clamp_normalized,
    finite,
)
from groupnorm.backends.kernels.gpu.compiled.tiles import (
    UNSPECIALIZED,
    chunks_of,
    group_of,
    leads,
    over_group,
    over_positions,
    parameter_of,
    spread,
    spread_groups,
    tile_of,
)

__all__ = ["apply", "measure", "merge", "sum_rows", "whole"]


@triton.jit
def _load_tile(
    dy, x, scale, bias, statistics, groups, begin, offsets, exists, counted, first, sample,
    channel_exists, CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TILE_CHANNELS_P2: tl.constexpr, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Return xhat, the gradient before the activation, and per-channel values."""
    given = tl.load(x + begin + offsets, mask=exists, other=0.0).to(tl.float32)
    gradient = tl.load(dy + begin + offsets, mask=exists, other=0.0).to(tl.float32)
    constant = tl.zeros_like(exists)  # masked-out, non-finite elements, replaced by 0
    if MASK != 0:
        constant = (counted == 0) & (finite(given) == 0)
        given = tl.where(counted, given, clamp_masked(given))
    group = sample.to(tl.int64) * (CHANNELS // GROUP_SIZE) + group_of(
        first, GROUP_SIZE, TILE_CHANNELS_P2
    )
    where = statistics + group * 2
    high = tl.load(where, mask=channel_exists, other=0.0)
    low = tl.load(where + 1, mask=channel_exists, other=0.0)
    where += tl.cast(groups, tl.int64) * 2
    rstd = tl.load(where, mask=channel_exists, other=0.0)
    inv_count = tl.load(where + 1, mask=channel_exists, other=0.0)
    xhat = ((given - spread(high, CHANNELS_FIRST)) - spread(low, CHANNELS_FIRST)) * spread(
        rstd, CHANNELS_FIRST
    )
    xhat = tl.where(exists, xhat, 0.0)  # padding could overflow, and 0 * inf be summed
    factor = tl.zeros([TILE_CHANNELS_P2], tl.float32) + 1.0
    if SCALE:
        factor = parameter_of(scale, first, channel_exists, TILE_CHANNELS_P2)
    if MASK != 0:  # so could what is masked out, or its product with the scale
        largest = spread(tl.maximum(tl.abs(factor), 1.0), CHANNELS_FIRST)
        xhat = tl.where(counted, xhat, clamp_normalized(xhat, largest))
    if ACTIVATION != 0:
        z = xhat * spread(factor, CHANNELS_FIRST)
        if BIAS:
            z += spread(parameter_of(bias, first, channel_exists, TILE_CHANNELS_P2), CHANNELS_FIRST)
        gradient = activation_vjp(z, gradient, ACTIVATION)
    return xhat, gradient, constant, factor, rstd, inv_count


@triton.jit
def _write(
    dx, xhat, gradient, constant, counted, factor, rstd, mean, mean_product, begin, offsets,
    exists, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    through = spread(mean, CHANNELS_FIRST) + xhat * spread(mean_product, CHANNELS_FIRST)
    if MASK != 0:
        through = tl.where(counted, through, 0.0)
    found = (gradient * spread(factor, CHANNELS_FIRST) - through) * spread(rstd, CHANNELS_FIRST)
    if MASK != 0:
        found = tl.where(constant, 0.0, found)
    tl.store(dx + begin + offsets, found.to(dx.dtype.element_ty), mask=exists)


@triton.jit
def _keep_sums(
    products, gradients, of_products, of_gradients, row, first, channel_exists,
    CHANNELS: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr,
):  # fmt: skip
    where = row.to(tl.int64) * CHANNELS + first + tl.arange(0, TILE_CHANNELS_P2)
    tl.store(products + where, of_products, mask=channel_exists)
    tl.store(gradients + where, of_gradients, mask=channel_exists)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def whole(
    dy, x, scale, bias, mask, statistics, dx, products, gradients, steps, groups, begin_at,
    CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    TILE_CHANNELS_P2: tl.constexpr, TILE_POSITIONS: tl.constexpr, DIVISOR: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr, GROUPS_P2: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Compute dx of groups that fit a tile."""
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
    xhat, gradient, constant, factor, rstd, inv_count = _load_tile(
        dy, x, scale, bias, statistics, groups, begin, offsets, exists, counted, first, sample,
        channel_exists, CHANNELS, GROUP_SIZE, TILE_CHANNELS_P2, CHANNELS_FIRST, MASK, SCALE, BIAS,
        ACTIVATION,
    )  # fmt: skip
    of_gradients = over_positions(gradient, CHANNELS_FIRST)
    of_products = over_positions(gradient * xhat, CHANNELS_FIRST)
    mean = over_group(of_gradients * factor, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2) * inv_count
    mean_product = (
        over_group(of_products * factor, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2) * inv_count
    )
    _write(
        dx, xhat, gradient, constant, counted, factor, rstd, mean, mean_product, begin, offsets,
        exists, CHANNELS_FIRST, MASK,
    )  # fmt: skip
    _keep_sums(
        products, gradients, of_products, of_gradients, sample, first, channel_exists, CHANNELS,
        TILE_CHANNELS_P2
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def measure(
    dy, x, scale, bias, mask, statistics, parts, products, gradients, steps, groups, begin_at,
    CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    TILE_CHANNELS_P2: tl.constexpr, TILE_POSITIONS: tl.constexpr, DIVISOR: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr, GROUPS_P2: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Sum the part of each group that is in a tile."""
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
    xhat, gradient, _, factor, _, _ = _load_tile(
        dy, x, scale, bias, statistics, groups, begin, offsets, exists, counted, first, sample,
        channel_exists, CHANNELS, GROUP_SIZE, TILE_CHANNELS_P2, CHANNELS_FIRST, MASK, SCALE, BIAS,
        ACTIVATION,
    )  # fmt: skip
    of_gradients = over_positions(gradient, CHANNELS_FIRST)
    of_products = over_positions(gradient * xhat, CHANNELS_FIRST)
    chunks = chunks_of(steps, DIVISOR, TILE_POSITIONS)
    row = sample.to(tl.int64) * chunks + chunk
    _keep_sums(
        products, gradients, of_products, of_gradients, row, first, channel_exists, CHANNELS,
        TILE_CHANNELS_P2
    )  # fmt: skip
    group = sample.to(tl.int64) * (CHANNELS // GROUP_SIZE) + group_of(
        first, GROUP_SIZE, TILE_CHANNELS_P2
    )
    where = parts + (group * (PARTS * chunks) + part * chunks + chunk) * 2
    write = leads(GROUP_SIZE, TILE_CHANNELS_P2, PARTS) & channel_exists
    tl.store(
        where,
        over_group(of_gradients * factor, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2),
        mask=write,
    )
    tl.store(
        where + 1,
        over_group(of_products * factor, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2),
        mask=write,
    )


@triton.jit
def _merged(parts, group, exists, begin, tiles, MERGE_P2: tl.constexpr):
    """Sum up to MERGE_P2 parts of groups, (GROUPS_P2,)."""
    number = begin + tl.arange(0, MERGE_P2)
    there = (number < tiles)[:, None] & exists[None, :]
    where = parts + (group[None, :] * tiles + number[:, None]) * 2
    of_gradients = tl.sum(tl.load(where, mask=there, other=0.0), 0)
    return of_gradients, tl.sum(tl.load(where + 1, mask=there, other=0.0), 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge(parts, merged, tiles, begin_at, MERGE_P2: tl.constexpr):
    """Sum all parts of a group, if there are many."""
    group = (tl.program_id(0) + begin_at).to(tl.int64) + tl.arange(0, 1)
    exists = group >= 0
    of_gradients = tl.zeros([1], tl.float64)
    of_products = tl.zeros([1], tl.float64)
    for begin in range(0, tiles, MERGE_P2):
        more, more_products = _merged(parts, group, exists, begin, tiles, MERGE_P2)
        of_gradients += more.to(tl.float64)
        of_products += more_products.to(tl.float64)
    tl.store(merged + group * 2, of_gradients.to(tl.float32))
    tl.store(merged + group * 2 + 1, of_products.to(tl.float32))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def apply(
    dy, x, scale, bias, mask, statistics, parts, dx, steps, groups, tiles, begin_at,
    MERGE_P2: tl.constexpr, CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    DIVISOR: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr,
    GROUPS_P2: tl.constexpr, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Compute dx from at most MERGE_P2 parts of each group."""
    # In reverse order: the tiles measured last may still be in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0) + begin_at
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
    xhat, gradient, constant, factor, rstd, inv_count = _load_tile(
        dy, x, scale, bias, statistics, groups, begin, offsets, exists, counted, first, sample,
        channel_exists, CHANNELS, GROUP_SIZE, TILE_CHANNELS_P2, CHANNELS_FIRST, MASK, SCALE, BIAS,
        ACTIVATION,
    )  # fmt: skip
    number = first // GROUP_SIZE + tl.arange(0, GROUPS_P2)
    group = sample.to(tl.int64) * (CHANNELS // GROUP_SIZE) + number
    mean, mean_product = _merged(parts, group, number < CHANNELS // GROUP_SIZE, 0, tiles, MERGE_P2)
    _write(
        dx, xhat, gradient, constant, counted, factor, rstd,
        spread_groups(mean, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2) * inv_count,
        spread_groups(mean_product, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2) * inv_count, begin,
        offsets, exists, CHANNELS_FIRST, MASK,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sum_rows(
    products, gradients, product_sums, gradient_sums, rows, ROWS_PER_BLOCK, CHANNELS: tl.constexpr,
    ROWS_P2: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum ROWS_PER_BLOCK rows of BLOCK_CHANNELS channels in float64, ROWS_P2 rows at once."""
    pieces: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    channel = tl.program_id(0) % pieces * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_exists = channel < CHANNELS
    block = (tl.program_id(0) // pieces).to(tl.int64)
    end = tl.minimum(tl.cast(rows, tl.int64), (block + 1) * ROWS_PER_BLOCK)
    product_sum = tl.zeros([ROWS_P2, BLOCK_CHANNELS], tl.float64)
    gradient_sum = tl.zeros([ROWS_P2, BLOCK_CHANNELS], tl.float64)
    for begin in range(0, ROWS_PER_BLOCK, ROWS_P2):
        row = block * ROWS_PER_BLOCK + begin + tl.arange(0, ROWS_P2)
        there = (row < end)[:, None] & channel_exists[None, :]
        where = row[:, None] * CHANNELS + channel[None, :]
        product_sum += tl.load(products + where, mask=there, other=0.0).to(tl.float64)
        gradient_sum += tl.load(gradients + where, mask=there, other=0.0).to(tl.float64)
    where = block * CHANNELS + channel
    tl.store(product_sums + where, tl.sum(product_sum, 0).to(tl.float32), mask=channel_exists)
    tl.store(gradient_sums + where, tl.sum(gradient_sum, 0).to(tl.float32), mask=channel_exists)
