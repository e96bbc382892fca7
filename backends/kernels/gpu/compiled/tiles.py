"""Tiles: how a program of a Triton grid finds its elements, and sums over groups.

An array is (samples, channels, positions) or (samples, positions, channels), without gaps. A tile
has some channels, of whole groups or a part of one, and some positions, all of them or a chunk. The
axis that is contiguous in memory is its last, so that the same code handles both orders.

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
PARTS
    tiles that cover the channels of one group; 1 if a tile holds whole groups;
BLOCKS
    tiles that cover all channels;
GROUPS_P2
    the next power of two of the groups of a tile;
FULL
    whether all elements of all tiles exist.
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

# Arguments that Triton does not specialize for being 1 or a multiple of 16.
UNSPECIALIZED = ("begin_at", "groups", "tiles", "rows", "ROWS_PER_BLOCK")


@triton.jit
def chunks_of(steps, DIVISOR: tl.constexpr, TILE_POSITIONS: tl.constexpr):
    """Return the number of tiles that cover all positions."""
    return tl.cdiv(tl.cast(steps, tl.int64) * DIVISOR, TILE_POSITIONS).to(tl.int32)


@triton.jit
def place(
    pid, steps, GROUP_SIZE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
    TILE_POSITIONS: tl.constexpr, DIVISOR: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """Return a tile's sample, first channel, part of the group, and chunk of the positions.

    Consecutive tiles are adjacent in memory.
    """
    chunks = chunks_of(steps, DIVISOR, TILE_POSITIONS)
    if CHANNELS_FIRST:
        chunk = pid % chunks
        block = (pid // chunks) % BLOCKS
    else:
        block = pid % BLOCKS
        chunk = (pid // BLOCKS) % chunks
    sample = pid // BLOCKS // chunks
    if PARTS == 1:
        first = block * TILE_CHANNELS
        part = 0
    else:
        part = block % PARTS
        first = (block // PARTS) * GROUP_SIZE + part * TILE_CHANNELS
    return sample, first, part, chunk


@triton.jit
def offsets_of(
    sample, first, part, chunk, steps, CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    DIVISOR: tl.constexpr, PARTS: tl.constexpr, CHANNELS_FIRST: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Return where a tile begins, the offsets of its elements, and which of them exist.

    The last as three masks: of the tile, of its channels and of its positions.
    """
    lane = tl.arange(0, TILE_CHANNELS_P2)
    step = tl.arange(0, TILE_POSITIONS)
    channel_exists = lane < TILE_CHANNELS
    if PARTS == 1:
        if CHANNELS % TILE_CHANNELS != 0:
            channel_exists = channel_exists & (first + lane < CHANNELS)
    else:
        if GROUP_SIZE % TILE_CHANNELS != 0:
            channel_exists = channel_exists & (part * TILE_CHANNELS + lane < GROUP_SIZE)
    positions = tl.cast(steps, tl.int64) * DIVISOR
    start = chunk.to(tl.int64) * TILE_POSITIONS
    position_exists = step < positions - start
    begin = sample.to(tl.int64) * CHANNELS * positions
    if CHANNELS_FIRST:
        begin += first * positions + start
        offsets = (lane * positions)[:, None] + step[None, :]
        exists = channel_exists[:, None] & position_exists[None, :]
    else:
        begin += start * CHANNELS + first
        offsets = (step * CHANNELS)[:, None] + lane[None, :]
        exists = position_exists[:, None] & channel_exists[None, :]
    if FULL:  # constant-folded
        channel_exists = tl.full([TILE_CHANNELS_P2], 1, tl.int1)
        position_exists = tl.full([TILE_POSITIONS], 1, tl.int1)
        exists = tl.full(
            [TILE_CHANNELS_P2, TILE_POSITIONS]
            if CHANNELS_FIRST
            else [TILE_POSITIONS, TILE_CHANNELS_P2],
            1,
            tl.int1,
        )
    return begin, offsets, exists, channel_exists, position_exists


@triton.jit
def counted_in(
    mask, sample, chunk, steps, exists, position_exists, TILE_POSITIONS: tl.constexpr,
    DIVISOR: tl.constexpr, MASK: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """Return the valid elements; MASK is 0 for none, 1 for one mask, 2 for one per sample."""
    counted = exists
    if MASK != 0:
        begin = chunk.to(tl.int64) * TILE_POSITIONS
        if MASK == 2:
            begin += sample.to(tl.int64) * tl.cast(steps, tl.int64) * DIVISOR
        valid = (
            tl.load(mask + begin + tl.arange(0, TILE_POSITIONS), mask=position_exists, other=0) != 0
        )
        if CHANNELS_FIRST:
            counted = exists & valid[None, :]
        else:
            counted = exists & valid[:, None]
    return counted


@triton.jit
def tile_of(
    pid, mask, steps, CHANNELS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, TILE_POSITIONS: tl.constexpr,
    DIVISOR: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    FULL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return the results of `place` and `offsets_of` except positions, and the valid elements."""
    sample, first, part, chunk = place(
        pid,
        steps,
        GROUP_SIZE,
        TILE_CHANNELS,
        TILE_POSITIONS,
        DIVISOR,
        PARTS,
        BLOCKS,
        CHANNELS_FIRST,
    )
    begin, offsets, exists, channel_exists, position_exists = offsets_of(
        sample,
        first,
        part,
        chunk,
        steps,
        CHANNELS,
        GROUP_SIZE,
        TILE_CHANNELS,
        TILE_CHANNELS_P2,
        TILE_POSITIONS,
        DIVISOR,
        PARTS,
        CHANNELS_FIRST,
        FULL,
    )
    counted = counted_in(
        mask, sample, chunk, steps, exists, position_exists, TILE_POSITIONS, DIVISOR, MASK,
        CHANNELS_FIRST
    )  # fmt: skip
    return sample, first, part, chunk, begin, offsets, exists, channel_exists, counted


@triton.jit
def spread(value, CHANNELS_FIRST: tl.constexpr):
    """Reshape per-channel values so that they broadcast to the tile."""
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
def leads(GROUP_SIZE: tl.constexpr, TILE_CHANNELS_P2: tl.constexpr, PARTS: tl.constexpr):
    """Return the lanes that write per-group values."""
    lane = tl.arange(0, TILE_CHANNELS_P2)
    if PARTS == 1:
        found = lane % GROUP_SIZE == 0
    else:
        found = lane == 0
    return found


@triton.jit
def parameter_of(parameter, first, channel_exists, TILE_CHANNELS_P2: tl.constexpr):
    """Read a parameter: one value per channel."""
    where = parameter + first + tl.arange(0, TILE_CHANNELS_P2)
    return tl.load(where, mask=channel_exists, other=0.0).to(tl.float32)
