"""Dividing an array into tiles and slabs of GPU kernels, by its shape alone.

It does not depend on the device: the same call gives the same bits on every GPU.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from groupnorm.backends.kernels.grouped_shape import GroupedShape

__all__ = [
    "MAX_OFFSET",
    "Slabs",
    "Tiles",
    "power_of_two",
    "slabs_of",
    "slabs_of_whole_groups",
    "tiles_of_small_groups",
    "warps_for",
]

# The most elements of a tile of small groups, padding included: with them in registers, two blocks
# still fit a multiprocessor. One that holds two arrays has half as many.
SMALL = 8192
# Where channels come first, larger groups than this are read twice: the loops are cheaper.
SMALL_FIRST = 2048
# A tile takes several whole groups, up to `BUNDLE` elements, if at least `ENOUGH` tiles remain.
BUNDLE, ENOUGH = 4096, 512
# Shorter rows (in bytes) waste memory bandwidth.
ROW_BYTES = 64
SECTOR_BYTES = 32
# The most elements of the table that maps channels to groups.
TABLE = 4096
ELEMENTS_OF_A_THREAD = 32
LOAD_BYTES = 16  # of a thread at once
# Offsets within a tile are 32-bit integers.
MAX_OFFSET = 2**31 - 1

# Slabs: lanes where channels come last, and positions of a tile where they come first.
WIDTHS, LENGTH = (64, 32), 128
SLAB_WARPS = 4
UNROLL = 4  # tiles that are read before anything is computed from them
# A pivot is the mean of at least this part of what it serves; see ``compiled/forward.py``.
SAMPLED = 16
# Groups that one program reads twice, the second time from the cache: their bytes, and how many of
# them make up for groups of more than `LONE` elements, for which more programs are better.
CACHED_BYTES, MANY_GROUPS, LONE = 1 << 17, 256, 1 << 14
MOST_ROWS = 8  # channels of a tile of theirs


class Tiles(NamedTuple):
    """Tiles of small groups; see ``compiled/tiles.py``."""

    width: int  # TILE_CHANNELS
    length: int  # TILE_POSITIONS

    def blocks(self, shape: GroupedShape) -> int:
        """The number of tiles that cover all channels."""
        return -(-shape.channels // self.width)

    def elements(self) -> int:
        """The number of elements of a tile, padding to powers of two included."""
        return power_of_two(self.width) * self.length

    def full(self, shape: GroupedShape) -> bool:
        """Whether no tile has padding."""
        return (
            self.width == power_of_two(self.width)
            and shape.channels % self.width == 0
            and shape.positions == self.length
        )

    def groups(self, shape: GroupedShape) -> int:
        """The number of groups in a tile."""
        return self.width // shape.group_size


class Slabs(NamedTuple):
    """Slabs, which programs walk over tile by tile; see ``compiled/loops.py``."""

    width: int  # TILE_CHANNELS
    length: int  # TILE_POSITIONS
    unroll: int  # UNROLL
    chunk: int  # the positions of a slab, a multiple of a round's, or all positions
    warps: int

    @property
    def at_once(self) -> int:
        """The positions of a round."""
        return self.length * self.unroll

    def blocks(self, shape: GroupedShape) -> int:
        """The number of slabs that cover all channels."""
        return -(-shape.channels // self.width)

    def chunks(self, shape: GroupedShape) -> int:
        """The number of slabs that cover all positions."""
        return -(-shape.positions // self.chunk)

    def sample(self, blocks: int = 1) -> int:
        """The number of tiles that a pivot is the mean of, for `blocks` times the channels."""
        return -(-self.chunk * blocks // (SAMPLED * self.length))

    def even(self, shape: GroupedShape) -> bool:
        """Whether all slabs consist of whole rounds."""
        return gcd(self.chunk, shape.positions) % self.at_once == 0


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def warps_for(elements: int) -> int:
    """Return the number of warps for a tile."""
    return min(max(elements // (32 * ELEMENTS_OF_A_THREAD), 1), 16)


# Small groups -------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def tiles_of_small_groups(shape: GroupedShape, limit: int) -> Tiles | None:
    """Divide into whole groups; return None if a group has more than `limit` elements."""
    length = power_of_two(shape.positions)
    too_far = not shape.channels_first and length * shape.channels > MAX_OFFSET
    if power_of_two(shape.group_size) * length > limit or too_far:
        return None
    found = Tiles(shape.group_size, length)
    for width in _widths(shape, length, limit):
        tiles = Tiles(width, length)
        many = shape.samples * tiles.blocks(shape) >= ENOUGH
        if not (_wasteful(shape, found.width) or (many and tiles.elements() <= BUNDLE)):
            break
        found = tiles
    # Rows shorter than a sector would fetch every sector several times, for different tiles.
    narrow = not shape.channels_first and found.width < shape.channels
    return None if narrow and found.width * shape.item_bytes < SECTOR_BYTES else found


def _widths(shape: GroupedShape, length: int, limit: int) -> list[int]:
    """Return efficient widths of several whole groups, in ascending order."""
    together = (
        1 if shape.channels_first else 8 // gcd(shape.group_size, 8)
    )  # groups until rows are aligned
    found = []
    for groups in range(together, shape.groups + 1, together):
        width = groups * shape.group_size
        padded = power_of_two(width)
        if padded * length > limit or padded * power_of_two(groups) > TABLE:
            break
        if 4 * width >= 3 * padded or groups == together:
            found.append(width)
    return found


def _wasteful(shape: GroupedShape, width: int) -> bool:
    """Whether rows of this width waste bandwidth, or prevent vectorized loads."""
    if shape.channels_first or width == shape.channels:
        return False
    return width * shape.item_bytes < ROW_BYTES or (width % 8 > 0 and shape.channels % 8 == 0)


# Slabs --------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def slabs_of_whole_groups(shape: GroupedShape, arrays: int, unroll: int) -> Slabs | None:
    """Divide into groups, one program each, if they stay in the cache; else return None.

    Parameters
    ----------
    arrays : int
        How many arrays of x's shape are read.
    unroll : int
        The most tiles of a round.
    """
    size = shape.group_size * shape.positions
    few = shape.samples * shape.groups < MANY_GROUPS and size > LONE
    if not shape.channels_first or few or size * shape.item_bytes * arrays > CACHED_BYTES:
        return None
    dividing = min(shape.group_size & -shape.group_size, MOST_ROWS)  # all lanes have a channel
    # A round should be of at least `UNROLL` loads of each thread, with several blocks at once.
    most = 4 if shape.samples * shape.groups >= 4 * MANY_GROUPS else 8
    round_bytes = dividing * power_of_two(shape.positions) * shape.item_bytes
    warps = min(max(round_bytes // (32 * LOAD_BYTES * UNROLL), 2), most)
    at_once = 32 * warps * LOAD_BYTES // shape.item_bytes
    length = min(power_of_two(shape.positions), at_once // dividing)
    width = min(dividing, at_once // length)
    unroll = min(unroll, power_of_two(-(-shape.positions // length)))
    found = Slabs(width, length, unroll, shape.positions, warps)
    sampled = found.sample(shape.group_size // width)
    enough = sampled <= unroll and SAMPLED * width * min(sampled * length, shape.positions) >= size
    return found if enough or arrays > 1 else None  # only statistics take pivots


@lru_cache(maxsize=4096)
def slabs_of(shape: GroupedShape, programs: int, unroll: int, longest: int = MAX_OFFSET) -> Slabs:
    """Divide into about `programs` slabs, none of which has more than `longest` rounds."""
    at_once = 32 * SLAB_WARPS * LOAD_BYTES // shape.item_bytes
    if shape.channels_first:
        length = min(power_of_two(shape.positions), LENGTH)
        width = min(power_of_two(shape.channels), at_once // length)
        length = min(power_of_two(shape.positions), at_once // width)
    else:
        width = _lanes(shape.channels)
        length = min(power_of_two(shape.positions), at_once // width)
    unroll = min(unroll, power_of_two(-(-shape.positions // length)))
    while not shape.channels_first and length * unroll * shape.channels > MAX_OFFSET:
        length, unroll = (length, unroll // 2) if unroll > 1 else (length // 2, 1)
    size = length * unroll
    rounds = -(-shape.positions // size)
    slabs = shape.samples * -(-shape.channels // width)
    chunks = min(max(programs // slabs, -(-rounds // longest), 1), rounds)
    # Of similar numbers, one that divides the rounds leaves no slab with fewer.
    similar = range(chunks, min(2 * chunks, rounds) + 1)
    chunks = next((number for number in similar if rounds % number == 0), chunks)
    return Slabs(width, length, unroll, -(-rounds // chunks) * size, SLAB_WARPS)


def _lanes(channels: int) -> int:
    """Return the width that leaves the fewest lanes without a channel, preferably a wide one."""
    if channels <= WIDTHS[-1]:
        return power_of_two(channels)
    return min(WIDTHS, key=lambda width: -(-channels // width) * width)
