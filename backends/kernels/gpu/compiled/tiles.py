"""Tiles of whole groups: how a program finds its elements, and sums over groups.

An array is (samples, channels, positions) or (samples, positions, channels), without gaps. A tile
has the channels of one or several whole groups, and all positions. The axis that is contiguous in
memory is its last, so that the same code handles both orders.

Per-channel values are vectors of TILE_CHANNELS_P2 lanes. Per-group values are such vectors as well,
equal on all lanes of a group.

Constants of all kernels:

CHANNELS, GROUP_SIZE
    channels of an array, and of a group;
CHANNELS_FIRST
    whether channels come before positions;
DIVISOR
    a power of two that divides the positions, of which there are ``steps * DIVISOR``;
TILE_CHANNELS, TILE_POSITIONS
    channels and positions of a tile; TILE_CHANNELS_P2 is the next power of two of the former;
BLOCKS
    tiles that cover all channels;
GROUPS_P2
    the next power of two of the groups of a tile;
FULL
    whether all elements of all tiles exist;
MASK
    0 for no mask, 1 for one mask, 2 for one per sample;
ROWS
    whether scale and bias have a row for each sample.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "UNSPECIALIZED",
    "follow",
    "group_of",
    "leads",
    "members",
    "over_group",
    "over_positions",
    "parameters_of",
    "spread",
    "spread_groups",
    "summed",
    "tile_of",
    "top_of_group",
]

# Arguments that Triton does not specialize for being 1 or a multiple of 16.
UNSPECIALIZED = ("chunks", "groups", "rows", "ROWS_PER_BLOCK")


@triton.jit
def follow(DEPENDENT: tl.constexpr):
    """Let the next launch of the sequence begin, and wait for the end of the one before.

    DEPENDENT is whether launches overlap; each then has to wait before it reads what the others
    wrote. It is 0 unless the launcher sets it, for GPUs that can.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def tile_of(
    pid, mask, steps, CHANNELS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    TILE_CHANNELS_P2: tl.constexpr, TILE_POSITIONS: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCKS: tl.constexpr, CHANNELS_FIRST: tl.constexpr, FULL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return a tile's sample, first channel, first element, offsets of elements, and what exists.

    The last as three masks: of the elements, of the channels, and of the valid elements.
    """
    sample, first = pid // BLOCKS, pid % BLOCKS * TILE_CHANNELS
    lane = tl.arange(0, TILE_CHANNELS_P2)
    step = tl.arange(0, TILE_POSITIONS)
    channel_exists = lane < TILE_CHANNELS
    if CHANNELS % TILE_CHANNELS != 0:
        channel_exists = channel_exists & (first + lane < CHANNELS)
    positions = tl.cast(steps, tl.int64) * DIVISOR
    position_exists = step < positions
    if FULL:  # constant-folded
        channel_exists = tl.full([TILE_CHANNELS_P2], 1, tl.int1)
        position_exists = tl.full([TILE_POSITIONS], 1, tl.int1)
    begin = sample.to(tl.int64) * CHANNELS * positions
    if CHANNELS_FIRST:
        begin += first * positions
        offsets = (lane * positions)[:, None] + step[None, :]
    else:
        begin += first
        offsets = (step * CHANNELS)[:, None] + lane[None, :]
    exists = spread(channel_exists, CHANNELS_FIRST) & spread(position_exists, not CHANNELS_FIRST)
    counted = exists
    if MASK != 0:
        where = step.to(tl.int64)
        if MASK == 2:
            where += sample.to(tl.int64) * positions
        valid = tl.load(mask + where, mask=position_exists, other=0) != 0
        counted = exists & spread(valid, not CHANNELS_FIRST)
    return sample, first, begin, offsets, exists, channel_exists, counted


@triton.jit
def spread(value, CHANNELS_FIRST: tl.constexpr):
    """Reshape per-channel values so that they broadcast to the tile.

    With ``not CHANNELS_FIRST``, it does so with per-position values.
    """
    if CHANNELS_FIRST:
        value = value[:, None]
    else:
        value = value[None, :]
    return value


@triton.jit
def over_positions(tile, CHANNELS_FIRST: tl.constexpr):
    """Sum a tile over positions: one value per channel."""
    return tl.sum(tile, 1 if CHANNELS_FIRST else 0)


@triton.jit
def members(GROUP_SIZE: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, GROUPS_P2: tl.constexpr):
    """Return which lanes belong to which of the tile's groups, (GROUPS_P2, TILE_CHANNELS_P2)."""
    return (tl.arange(0, TILE_CHANNELS_P2) // GROUP_SIZE)[None, :] == tl.arange(0, GROUPS_P2)[
        :, None
    ]


@triton.jit
def spread_groups(
    value, GROUP_SIZE: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, GROUPS_P2: tl.constexpr
):
    """Copy per-group values, (GROUPS_P2,), to the lanes of each group."""
    if GROUPS_P2 == 1:
        found = tl.zeros([TILE_CHANNELS_P2], value.dtype) + tl.sum(value, 0)
    else:
        found = tl.sum(
            tl.where(members(GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2), value[:, None], 0.0), 0
        )
    return found


@triton.jit
def over_group(
    value, GROUP_SIZE: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, GROUPS_P2: tl.constexpr
):
    """Sum per-channel values over each group; lanes without a channel must be 0."""
    if GROUPS_P2 == 1:
        found = tl.zeros([TILE_CHANNELS_P2], value.dtype) + tl.sum(value, 0)
    else:
        sums = tl.sum(
            tl.where(members(GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2), value[None, :], 0.0), 1
        )
        found = spread_groups(sums, GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2)
    return found


@triton.jit
def summed(
    tile,
    GROUP_SIZE: tl.constexpr,
    TILE_CHANNELS_P2: tl.constexpr,
    GROUPS_P2: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
):
    """Sum a tile over each group."""
    return over_group(over_positions(tile, CHANNELS_FIRST), GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2)


@triton.jit
def top_of_group(
    tile, LOW: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr,
    GROUPS_P2: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """Return the maximum of each group in a tile, at least LOW."""
    top = tl.max(tile, 1 if CHANNELS_FIRST else 0)
    if GROUPS_P2 == 1:
        found = tl.zeros([TILE_CHANNELS_P2], tl.float32) + tl.maximum(tl.max(top, 0), LOW)
    else:
        inside = members(GROUP_SIZE, TILE_CHANNELS_P2, GROUPS_P2)
        tops = tl.max(tl.where(inside, top[None, :], LOW), 1)
        found = tl.max(tl.where(inside, tops[:, None], LOW), 0)
    return found


@triton.jit
def group_of(first, GROUP_SIZE: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr):
    """Return the index of each lane's group within the sample."""
    return (first + tl.arange(0, TILE_CHANNELS_P2)) // GROUP_SIZE


@triton.jit
def leads(GROUP_SIZE: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr):
    """Return the lanes that write per-group values."""
    return tl.arange(0, TILE_CHANNELS_P2) % GROUP_SIZE == 0


@triton.jit
def parameters_of(
    scale, bias, sample, first, exists, CHANNELS: tl.constexpr, LANES: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return scale and bias, one value per channel; 1 and 0 if they are missing."""
    where = first + tl.arange(0, LANES)
    if ROWS:
        where += sample.to(tl.int64) * CHANNELS
    factor = tl.zeros([LANES], tl.float32) + 1.0
    if SCALE:
        factor = tl.load(scale + where, mask=exists, other=0.0).to(tl.float32)
    offset = tl.zeros([LANES], tl.float32)
    if BIAS:
        offset = tl.load(bias + where, mask=exists, other=0.0).to(tl.float32)
    return factor, offset
