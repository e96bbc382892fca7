"""Tiles: how a program of a Triton grid finds its elements, and sums over groups.

An array is (samples, channels, positions) or (samples, positions, channels), without gaps. A tile
is of some channels, whole groups or a part of one, and some positions, all of them or a chunk. It
has the axis that is contiguous in memory last, so that the same code serves both orders.

What is one number a channel is a vector of WP lanes. What is one number a group is such a vector as
well, the same on all lanes of the group.

Constants of all kernels: C channels, in groups of D; FIRST, whether channels come before positions;
V, a power of two that divides the positions, of which there are ``steps * V``; W channels and BP
positions of a tile, WP the next power of two above W; J tiles side by side for the channels of one
group, or 1 where a tile holds whole groups; NB such tiles for all channels; GBP the next power of
two above the number of groups of a tile; FULL, whether all elements of all tiles exist.
"""

import triton
import triton.language as tl

__all__ = [
    "UNSPECIALIZED",
    "chunks_of",
    "group_of",
    "leads",
    "members",
    "over_group",
    "over_positions",
    "parameter_of",
    "spread",
    "spread_groups",
    "summed",
    "tile_of",
    "top_of_group",
]

# Arguments that Triton compiles nothing anew for, whether they are 1, or multiples of 16, or not.
UNSPECIALIZED = ("begin_at", "groups", "tiles", "rows", "R")


@triton.jit
def chunks_of(steps, V: tl.constexpr, BP: tl.constexpr):
    """Return how many tiles all positions take."""
    return tl.cdiv(tl.cast(steps, tl.int64) * V, BP).to(tl.int32)


@triton.jit
def place(
    pid, steps, D: tl.constexpr, W: tl.constexpr, BP: tl.constexpr, V: tl.constexpr,
    J: tl.constexpr, NB: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Return a tile's sample, first channel, part of the group, and chunk of the positions.

    Tiles that follow each other lie side by side in memory.
    """
    chunks = chunks_of(steps, V, BP)
    if FIRST:
        chunk = pid % chunks
        block = (pid // chunks) % NB
    else:
        block = pid % NB
        chunk = (pid // NB) % chunks
    sample = pid // NB // chunks
    if J == 1:
        first = block * W
        part = 0
    else:
        part = block % J
        first = (block // J) * D + part * W
    return sample, first, part, chunk


@triton.jit
def offsets_of(
    sample, first, part, chunk, steps, C: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, BP: tl.constexpr, V: tl.constexpr, J: tl.constexpr, FIRST: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Return where a tile begins, the offsets of its elements, and which of them exist.

    The latter for the tile, for its channels and for its positions.
    """
    lane = tl.arange(0, WP)
    step = tl.arange(0, BP)
    channel_exists = lane < W
    if J == 1:
        if C % W != 0:
            channel_exists = channel_exists & (first + lane < C)
    else:
        if D % W != 0:
            channel_exists = channel_exists & (part * W + lane < D)
    positions = tl.cast(steps, tl.int64) * V
    start = chunk.to(tl.int64) * BP
    position_exists = step < positions - start
    begin = sample.to(tl.int64) * C * positions
    if FIRST:
        begin += first * positions + start
        offsets = (lane * positions)[:, None] + step[None, :]
        exists = channel_exists[:, None] & position_exists[None, :]
    else:
        begin += start * C + first
        offsets = (step * C)[:, None] + lane[None, :]
        exists = position_exists[:, None] & channel_exists[None, :]
    if FULL:  # a constant, of which nothing is left in the program
        channel_exists = tl.full([WP], 1, tl.int1)
        position_exists = tl.full([BP], 1, tl.int1)
        exists = tl.full([WP, BP] if FIRST else [BP, WP], 1, tl.int1)
    return begin, offsets, exists, channel_exists, position_exists


@triton.jit
def counted_in(
    mask, sample, chunk, steps, exists, position_exists, BP: tl.constexpr, V: tl.constexpr,
    MASK: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Return which elements of a tile count: MASK is 0 for all, 1 for one mask, 2 for each its."""
    counted = exists
    if MASK != 0:
        begin = chunk.to(tl.int64) * BP
        if MASK == 2:
            begin += sample.to(tl.int64) * tl.cast(steps, tl.int64) * V
        valid = tl.load(mask + begin + tl.arange(0, BP), mask=position_exists, other=0) != 0
        if FIRST:
            counted = exists & valid[None, :]
        else:
            counted = exists & valid[:, None]
    return counted


@triton.jit
def tile_of(
    pid, mask, steps, C: tl.constexpr, D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    BP: tl.constexpr, V: tl.constexpr, J: tl.constexpr, NB: tl.constexpr, FIRST: tl.constexpr,
    FULL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return what `place` and `offsets_of` do, but for positions, and which elements count."""
    sample, first, part, chunk = place(pid, steps, D, W, BP, V, J, NB, FIRST)
    begin, offsets, exists, channel_exists, position_exists = offsets_of(
        sample, first, part, chunk, steps, C, D, W, WP, BP, V, J, FIRST, FULL
    )
    counted = counted_in(
        mask, sample, chunk, steps, exists, position_exists, BP, V, MASK, FIRST
    )  # fmt: skip
    return sample, first, part, chunk, begin, offsets, exists, channel_exists, counted


@triton.jit
def spread(value, FIRST: tl.constexpr):
    """Bring what is one number a lane to a shape that broadcasts to the tile."""
    if FIRST:
        value = value[:, None]
    else:
        value = value[None, :]
    return value


@triton.jit
def over_positions(tile, FIRST: tl.constexpr):
    """Sum a tile to one number a channel."""
    return tl.sum(tile, 1 if FIRST else 0)


@triton.jit
def members(D: tl.constexpr, WP: tl.constexpr, GBP: tl.constexpr):
    """Return which lanes belong to which of the tile's groups, (GBP, WP)."""
    return (tl.arange(0, WP) // D)[None, :] == tl.arange(0, GBP)[:, None]


@triton.jit
def spread_groups(value, D: tl.constexpr, WP: tl.constexpr, GBP: tl.constexpr):
    """Bring one number a group, (GBP,), to the lanes of the group."""
    if GBP == 1:
        found = tl.zeros([WP], value.dtype) + tl.sum(value, 0)
    else:
        found = tl.sum(tl.where(members(D, WP, GBP), value[:, None], 0.0), 0)
    return found


@triton.jit
def over_group(value, D: tl.constexpr, WP: tl.constexpr, GBP: tl.constexpr):
    """Sum what is one number a channel, 0 where there is none, over the channels of each group."""
    if GBP == 1:
        found = tl.zeros([WP], value.dtype) + tl.sum(value, 0)
    else:
        sums = tl.sum(tl.where(members(D, WP, GBP), value[None, :], 0.0), 1)
        found = spread_groups(sums, D, WP, GBP)
    return found


@triton.jit
def summed(tile, D: tl.constexpr, WP: tl.constexpr, GBP: tl.constexpr, FIRST: tl.constexpr):
    """Sum a tile over each group."""
    return over_group(over_positions(tile, FIRST), D, WP, GBP)


@triton.jit
def top_of_group(
    tile, LOW: tl.constexpr, D: tl.constexpr, WP: tl.constexpr, GBP: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Return the largest of a tile, at least LOW, for each group."""
    top = tl.max(tile, 1 if FIRST else 0)
    if GBP == 1:
        found = tl.zeros([WP], tl.float32) + tl.maximum(tl.max(top, 0), LOW)
    else:
        inside = members(D, WP, GBP)
        tops = tl.max(tl.where(inside, top[None, :], LOW), 1)
        found = tl.max(tl.where(inside, tops[:, None], LOW), 0)
    return found


@triton.jit
def group_of(first, D: tl.constexpr, WP: tl.constexpr):
    """Return the number of each lane's group within the sample."""
    return (first + tl.arange(0, WP)) // D


@triton.jit
def leads(D: tl.constexpr, WP: tl.constexpr, J: tl.constexpr):
    """Return which lanes are to write what is one number a group."""
    lane = tl.arange(0, WP)
    if J == 1:
        found = lane % D == 0
    else:
        found = lane == 0
    return found


@triton.jit
def parameter_of(parameter, first, channel_exists, WP: tl.constexpr):
    """Read one number a channel."""
    where = parameter + first + tl.arange(0, WP)
    return tl.load(where, mask=channel_exists, other=0.0).to(tl.float32)
