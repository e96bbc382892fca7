"""Slabs: how a program of a Triton grid walks over many positions of some channels, tile by tile.

An array is (samples, channels, positions) or (samples, positions, channels), without gaps. A slab
has TILE_CHANNELS channels, which need not be of whole groups, and a chunk of the positions. A
program loops over the tiles of its slab, TILE_POSITIONS positions each, and keeps sums by thread,
which are added up once, after the loop.

As in ``tiles``, the axis of a tile that is contiguous in memory is its last, and per-channel values
are vectors, here of TILE_CHANNELS lanes. Beside the constants that are described there:

TILE_CHANNELS, TILE_POSITIONS
    channels and positions of a tile, powers of two;
UNROLL
    tiles of one round of the loop, so that several loads are under way;
BLOCKS
    slabs that cover all channels;
EVEN
    whether all slabs have whole rounds only;
STAGES
    rounds that are under way at the same time, copied to shared memory first; 1 for none before.
"""

import triton
import triton.language as tl

from groupnorm.backends.kernels.gpu.compiled.tiles import spread

__all__ = ["mask_at", "offsets_in", "slab_of", "tile_in"]


@triton.jit
def slab_of(
    pid, mask, steps, chunk, chunks, CHANNELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, DIVISOR: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return where a slab is, and what `tile_in` needs of it.

    Its sample, its first channel, and the number of its chunk; the offset of its first element,
    the pointer to the mask's first position, the number of its positions, the lanes that have a
    channel, and the offsets of a tile's elements. Consecutive slabs are adjacent in memory.
    """
    if CHANNELS_FIRST:
        number = pid % chunks
        block = (pid // chunks) % BLOCKS
    else:
        block = pid % BLOCKS
        number = (pid // BLOCKS) % chunks
    sample, first = pid // BLOCKS // chunks, block * TILE_CHANNELS
    positions = tl.cast(steps, tl.int64) * DIVISOR
    start = number.to(tl.int64) * chunk
    rows = tl.minimum(positions - start, chunk).to(tl.int32)
    begin = sample.to(tl.int64) * CHANNELS * positions
    if CHANNELS_FIRST:
        begin += first * positions + start
    else:
        begin += start * CHANNELS + first
    if CHANNELS % TILE_CHANNELS == 0:  # constant-folded
        lanes = tl.full([TILE_CHANNELS], 1, tl.int1)
    else:
        lanes = first + tl.arange(0, TILE_CHANNELS) < CHANNELS
    mask = mask_at(mask, sample, start, steps, DIVISOR, MASK)
    offsets = offsets_in(steps, CHANNELS, TILE_CHANNELS, TILE_POSITIONS, DIVISOR, CHANNELS_FIRST)
    return sample, first, number, begin, mask, rows, lanes, offsets


@triton.jit
def offsets_in(
    steps, CHANNELS: tl.constexpr, TILE_CHANNELS: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    DIVISOR: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """Return the offsets of a tile's elements from its first."""
    lane, step = tl.arange(0, TILE_CHANNELS), tl.arange(0, TILE_POSITIONS)
    if CHANNELS_FIRST:
        offsets = (lane * (tl.cast(steps, tl.int64) * DIVISOR))[:, None] + step[None, :]
    else:
        offsets = (step * CHANNELS)[:, None] + lane[None, :]
    return offsets


@triton.jit
def mask_at(mask, sample, start, steps, DIVISOR: tl.constexpr, MASK: tl.constexpr):
    """Return the pointer to the mask's position `start` of a sample; MASK is as in ``tiles``."""
    if MASK == 2:
        start += sample.to(tl.int64) * (tl.cast(steps, tl.int64) * DIVISOR)
    return mask + start


@triton.jit
def tile_in(
    mask, begin, rows, lanes, offsets, STRIDE: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    LAST: tl.constexpr, CHANNELS_FIRST: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return the elements of the tile at position `begin` of a slab.

    Their offsets from the slab's first element, which of them exist, and which of these count; and
    which positions are valid. Only if LAST, there may be fewer positions than TILE_POSITIONS.
    """
    # int64, as the product may exceed 2**31
    where = tl.cast(begin, tl.int64) * STRIDE + offsets
    step = begin + tl.arange(0, TILE_POSITIONS)
    if LAST:
        present = step < rows
    else:  # constant-folded
        present = tl.full([TILE_POSITIONS], 1, tl.int1)
    exists = spread(lanes, CHANNELS_FIRST) & spread(present, not CHANNELS_FIRST)
    counted, valid = exists, present
    if MASK != 0:
        valid = tl.load(mask + step, mask=present, other=0) != 0
        counted = exists & spread(valid, not CHANNELS_FIRST)
    return where, exists, counted, valid
