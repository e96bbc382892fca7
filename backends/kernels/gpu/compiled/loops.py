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

__all__ = ["exists_in", "lanes_of", "offsets_in", "slab_of", "valid_in"]


@triton.jit
def slab_of(
    pid, steps, chunk, chunks, TILE_CHANNELS: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCKS: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """Return a slab's sample, first channel, number of its chunk, first position and positions.

    Consecutive slabs are adjacent in memory.
    """
    if CHANNELS_FIRST:
        number = pid % chunks
        block = (pid // chunks) % BLOCKS
    else:
        block = pid % BLOCKS
        number = (pid // BLOCKS) % chunks
    start = number.to(tl.int64) * chunk
    rows = tl.minimum(tl.cast(steps, tl.int64) * DIVISOR - start, chunk).to(tl.int32)
    return pid // BLOCKS // chunks, block * TILE_CHANNELS, number, start, rows


@triton.jit
def begin_of(
    sample, first, start, steps, CHANNELS: tl.constexpr, DIVISOR: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """Return the offset of an element, of the sample's channel `first` at position `start`."""
    positions = tl.cast(steps, tl.int64) * DIVISOR
    begin = sample.to(tl.int64) * CHANNELS * positions
    if CHANNELS_FIRST:
        begin += first * positions + start
    else:
        begin += start * CHANNELS + first
    return begin


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
def lanes_of(first, CHANNELS: tl.constexpr, TILE_CHANNELS: tl.constexpr):
    """Return the lanes of a slab that have a channel."""
    if CHANNELS % TILE_CHANNELS == 0:  # constant-folded
        lanes = tl.full([TILE_CHANNELS], 1, tl.int1)
    else:
        lanes = first + tl.arange(0, TILE_CHANNELS) < CHANNELS
    return lanes


@triton.jit
def exists_in(
    begin, rows, lanes, TILE_POSITIONS: tl.constexpr, LAST: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """Return the elements that exist in the tile at position `begin` of a slab.

    Only if LAST, it may have fewer positions than TILE_POSITIONS.
    """
    if LAST:
        present = begin + tl.arange(0, TILE_POSITIONS) < rows
    else:
        present = tl.full([TILE_POSITIONS], 1, tl.int1)
    return spread(lanes, CHANNELS_FIRST) & spread(present, not CHANNELS_FIRST)


@triton.jit
def valid_in(
    mask, begin, rows, TILE_POSITIONS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Return the valid positions of a tile; `mask` points to the slab's first position."""
    step = begin + tl.arange(0, TILE_POSITIONS)
    if LAST:
        valid = tl.load(mask + step, mask=step < rows, other=0) != 0
    else:
        valid = tl.load(mask + step) != 0
    return valid


@triton.jit
def mask_at(mask, sample, start, steps, DIVISOR: tl.constexpr, MASK: tl.constexpr):
    """Return the pointer to the mask's first position of a slab; MASK is as for `counted_in`."""
    if MASK == 2:
        start += sample.to(tl.int64) * (tl.cast(steps, tl.int64) * DIVISOR)
    return mask + start
