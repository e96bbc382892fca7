"""The backward pass of groups that are read twice, in Triton: `group`, or three kernels.

Let ``g`` be the gradient before the activation, and ``S1 = sum(g)`` and ``S2 = sum(g xhat)`` the
sums over the positions of a channel. Summed over samples, S1 and S2 are the gradients of bias and
scale. With ``p`` and ``q`` the sums of ``scale S1`` and ``scale S2`` over a group, divided by its
count, and ``m`` the mask, ``dx = rstd (scale g - m (p + xhat q))``.

S2 and S1 are written as ``products`` and ``gradients``, (rows, channels), with a row for each chunk
of each sample; `sum_rows` adds them up. ``merged`` is ``(samples * groups, 2)``: p and q.
"""

import triton
import triton.language as tl

from groupnorm.backends.kernels.gpu.compiled.elements import gradient_of_x, pulled_back
from groupnorm.backends.kernels.gpu.compiled.loops import (
    mask_at,
    offsets_in,
    slab_of,
    tile_in,
)
from groupnorm.backends.kernels.gpu.compiled.small import channel_values
from groupnorm.backends.kernels.gpu.compiled.tiles import (
    UNSPECIALIZED,
    follow,
    group_of,
    over_positions,
    parameters_of,
    spread,
)

__all__ = ["apply", "group", "measure", "merge", "sum_rows"]


@triton.jit
def _pulled(
    dy, x, mask, begin, rows, lanes, offsets, high, rstd, shift, factor, offset,
    STRIDE: tl.constexpr, TILE_POSITIONS: tl.constexpr, LAST: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Return what `pulled_back` returns for a tile, its offsets, and what exists and counts."""
    where, exists, counted, _ = tile_in(
        mask, begin, rows, lanes, offsets, STRIDE, TILE_POSITIONS, LAST, CHANNELS_FIRST, MASK
    )
    given = tl.load(x + where, mask=exists, other=0.0).to(tl.float32)
    gradient = tl.load(dy + where, mask=exists, other=0.0).to(tl.float32)
    xhat, gradient, constant = pulled_back(
        given, gradient, exists, counted, spread(high, CHANNELS_FIRST),
        spread(rstd, CHANNELS_FIRST), spread(shift, CHANNELS_FIRST),
        spread(factor, CHANNELS_FIRST), spread(offset, CHANNELS_FIRST), LAST, MASK, ACTIVATION,
    )  # fmt: skip
    return xhat, gradient, constant, where, exists, counted


@triton.jit
def _sums(
    dy, x, mask, rows, lanes, offsets, high, rstd, shift, factor, offset, STRIDE: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, UNROLL: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Return S2 and S1 of a slab, per channel."""
    products = tl.zeros(offsets.shape, tl.float32)
    gradients = tl.zeros(offsets.shape, tl.float32)
    ROUND: tl.constexpr = TILE_POSITIONS * UNROLL
    whole = rows
    if not EVEN:
        whole = rows // ROUND * ROUND
    for begin in tl.range(0, whole, ROUND, num_stages=STAGES):
        for tile in tl.static_range(UNROLL):
            xhat, gradient, _, _, _, _ = _pulled(
                dy, x, mask, begin + tile * TILE_POSITIONS, rows, lanes, offsets, high, rstd,
                shift, factor, offset, STRIDE, TILE_POSITIONS, False, CHANNELS_FIRST, MASK,
                ACTIVATION,
            )  # fmt: skip
            products += gradient * xhat
            gradients += gradient
    if not EVEN:
        for begin in range(whole, rows, TILE_POSITIONS):
            xhat, gradient, _, _, _, _ = _pulled(
                dy, x, mask, begin, rows, lanes, offsets, high, rstd, shift, factor, offset,
                STRIDE, TILE_POSITIONS, True, CHANNELS_FIRST, MASK, ACTIVATION,
            )  # fmt: skip
            products += gradient * xhat
            gradients += gradient
    return over_positions(products, CHANNELS_FIRST), over_positions(gradients, CHANNELS_FIRST)


@triton.jit
def _written(
    dy, x, dx, mask, begin, rows, lanes, offsets, high, rstd, shift, factor, offset, mean,
    mean_product, STRIDE: tl.constexpr, TILE_POSITIONS: tl.constexpr, LAST: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    xhat, gradient, constant, where, exists, counted = _pulled(
        dy, x, mask, begin, rows, lanes, offsets, high, rstd, shift, factor, offset, STRIDE,
        TILE_POSITIONS, LAST, CHANNELS_FIRST, MASK, ACTIVATION,
    )  # fmt: skip
    found = gradient_of_x(
        xhat, gradient, constant, counted, spread(factor * rstd, CHANNELS_FIRST),
        spread(mean * rstd, CHANNELS_FIRST), spread(mean_product * rstd, CHANNELS_FIRST), MASK,
    )  # fmt: skip
    tl.store(dx + where, found.to(dx.dtype.element_ty), mask=exists)


@triton.jit
def _write(
    dy, x, dx, mask, rows, lanes, offsets, high, rstd, shift, factor, offset, mean, mean_product,
    STRIDE: tl.constexpr, TILE_POSITIONS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Compute dx of a slab."""
    whole = rows
    if not EVEN:
        whole = rows // TILE_POSITIONS * TILE_POSITIONS
    for begin in tl.range(0, whole, TILE_POSITIONS, num_stages=STAGES):
        _written(
            dy, x, dx, mask, begin, rows, lanes, offsets, high, rstd, shift, factor, offset, mean,
            mean_product, STRIDE, TILE_POSITIONS, False, CHANNELS_FIRST, MASK, ACTIVATION,
        )  # fmt: skip
    if not EVEN:  # noqa: SIM102 - known when this is compiled, the other condition is not
        if whole < rows:
            _written(
                dy, x, dx, mask, whole, rows, lanes, offsets, high, rstd, shift, factor, offset,
                mean, mean_product, STRIDE, TILE_POSITIONS, True, CHANNELS_FIRST, MASK, ACTIVATION,
            )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def measure(
    dy, x, scale, bias, mask, statistics, products, gradients, steps, chunk, chunks, groups,
    CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, UNROLL: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    MASK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr = 0,
):  # fmt: skip
    """Sum over the positions of a slab."""
    follow(DEPENDENT)
    sample, first, number, begin, mask, rows, lanes, offsets = slab_of(
        tl.program_id(0), mask, steps, chunk, chunks, CHANNELS, TILE_CHANNELS, TILE_POSITIONS,
        DIVISOR, BLOCKS, CHANNELS_FIRST, MASK,
    )  # fmt: skip
    high, rstd, shift, _, factor, offset = channel_values(
        statistics, scale, bias, groups, sample, first, lanes, CHANNELS, GROUP_SIZE,
        TILE_CHANNELS, SCALE, BIAS, ROWS,
    )  # fmt: skip
    of_products, of_gradients = _sums(
        dy + begin, x + begin, mask, rows, lanes, offsets, high, rstd, shift, factor, offset,
        1 if CHANNELS_FIRST else CHANNELS, TILE_POSITIONS, UNROLL, EVEN, STAGES, CHANNELS_FIRST,
        MASK, ACTIVATION,
    )  # fmt: skip
    row = sample.to(tl.int64) * chunks + number
    where = row * CHANNELS + first + tl.arange(0, TILE_CHANNELS)
    tl.store(products + where, of_products, mask=lanes)
    tl.store(gradients + where, of_gradients, mask=lanes)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge(
    scale, products, gradients, statistics, merged, chunks, groups, CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
    DEPENDENT: tl.constexpr = 0,
):  # fmt: skip
    """Compute p and q of a group."""
    follow(DEPENDENT)
    group = tl.program_id(0).to(tl.int64)
    sample = group // (CHANNELS // GROUP_SIZE)
    channel = group % (CHANNELS // GROUP_SIZE) * GROUP_SIZE
    begin_row = sample * chunks * CHANNELS + channel
    count = chunks * GROUP_SIZE
    mean = tl.zeros([AT_ONCE], tl.float32)
    mean_product = tl.zeros([AT_ONCE], tl.float32)
    if ROWS:
        channel += sample * CHANNELS
    for begin in range(0, count, AT_ONCE):
        number = begin + tl.arange(0, AT_ONCE)
        there = number < count
        lane = number % GROUP_SIZE
        where = begin_row + (number // GROUP_SIZE).to(tl.int64) * CHANNELS + lane
        of_gradients = tl.load(gradients + where, mask=there, other=0.0)
        of_products = tl.load(products + where, mask=there, other=0.0)
        if SCALE:
            factor = tl.load(scale + channel + lane, mask=there, other=0.0).to(tl.float32)
            of_gradients *= factor
            of_products *= factor
        mean += of_gradients
        mean_product += of_products
    inv_count = tl.load(statistics + (tl.cast(groups, tl.int64) + group) * 2 + 1)
    tl.store(merged + group * 2, tl.sum(mean, 0) * inv_count)
    tl.store(merged + group * 2 + 1, tl.sum(mean_product, 0) * inv_count)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def apply(
    dy, x, scale, bias, mask, statistics, merged, dx, steps, chunk, chunks, groups,
    CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, DIVISOR: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr = 0,
):  # fmt: skip
    """Compute dx of a slab."""
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
    group = sample.to(tl.int64) * (CHANNELS // GROUP_SIZE) + group_of(
        first, GROUP_SIZE, TILE_CHANNELS
    )
    mean = tl.load(merged + group * 2, mask=lanes, other=0.0)
    mean_product = tl.load(merged + group * 2 + 1, mask=lanes, other=0.0)
    _write(
        dy + begin, x + begin, dx + begin, mask, rows, lanes, offsets, high, rstd, shift, factor,
        offset, mean, mean_product, 1 if CHANNELS_FIRST else CHANNELS, TILE_POSITIONS, EVEN,
        STAGES, CHANNELS_FIRST, MASK, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def group(
    dy, x, scale, bias, mask, statistics, dx, products, gradients, steps, groups,
    CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, UNROLL: tl.constexpr, DIVISOR: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr = 0,
):  # fmt: skip
    """Compute dx of a group, whose channels come before positions, TILE_CHANNELS after another."""
    follow(DEPENDENT)
    pid = tl.program_id(0)
    sample = pid // (CHANNELS // GROUP_SIZE)
    first = pid % (CHANNELS // GROUP_SIZE) * GROUP_SIZE
    rows = steps * DIVISOR
    lanes = tl.full([TILE_CHANNELS], 1, tl.int1)
    begin = pid.to(tl.int64) * GROUP_SIZE * rows
    mask = mask_at(mask, sample, tl.cast(0, tl.int64), steps, DIVISOR, MASK)
    offsets = offsets_in(steps, CHANNELS, TILE_CHANNELS, TILE_POSITIONS, DIVISOR, True)
    nothing = tl.zeros([TILE_CHANNELS], tl.float32)
    where = statistics + pid.to(tl.int64) * 2
    high, low = nothing + tl.load(where), tl.load(where + 1)
    where += tl.cast(groups, tl.int64) * 2
    rstd, inv_count = nothing + tl.load(where), tl.load(where + 1)
    shift = -low * rstd
    mean, mean_product = nothing, nothing
    for channel in range(0, GROUP_SIZE, TILE_CHANNELS):
        factor, offset = parameters_of(
            scale, bias, sample, first + channel, lanes, CHANNELS, TILE_CHANNELS, SCALE, BIAS, ROWS
        )
        at = begin + tl.cast(channel, tl.int64) * rows
        of_products, of_gradients = _sums(
            dy + at, x + at, mask, rows, lanes, offsets, high, rstd, shift, factor, offset, 1,
            TILE_POSITIONS, UNROLL, EVEN, STAGES, True, MASK, ACTIVATION,
        )  # fmt: skip
        row = pid.to(tl.int64) * GROUP_SIZE + channel + tl.arange(0, TILE_CHANNELS)
        tl.store(products + row, of_products)
        tl.store(gradients + row, of_gradients)
        mean += of_gradients * factor
        mean_product += of_products * factor
    mean = nothing + tl.sum(mean, 0) * inv_count
    mean_product = nothing + tl.sum(mean_product, 0) * inv_count
    WIDE: tl.constexpr = TILE_POSITIONS * min(UNROLL, 2)
    wide = offsets_in(steps, CHANNELS, TILE_CHANNELS, WIDE, DIVISOR, True)
    for done in range(0, GROUP_SIZE, TILE_CHANNELS):
        channel = GROUP_SIZE - TILE_CHANNELS - done  # what was read last is next to the processor
        factor, offset = parameters_of(
            scale, bias, sample, first + channel, lanes, CHANNELS, TILE_CHANNELS, SCALE, BIAS, ROWS
        )
        at = begin + tl.cast(channel, tl.int64) * rows
        _write(
            dy + at, x + at, dx + at, mask, rows, lanes, wide, high, rstd, shift, factor, offset,
            mean, mean_product, 1, WIDE, EVEN, STAGES, True, MASK, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sum_rows(
    products, gradients, product_sums, gradient_sums, rows, ROWS_PER_BLOCK, CHANNELS: tl.constexpr,
    ROWS_P2: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    DEPENDENT: tl.constexpr = 0,
):  # fmt: skip
    """Sum ROWS_PER_BLOCK rows of BLOCK_CHANNELS channels in float64, ROWS_P2 rows at once."""
    follow(DEPENDENT)
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
